"""mlm-jax checkpoint"""

import time
from functools import partial
from pathlib import Path

from mlm_jax.commands import command_parser, path, print_table
from mlm_jax.commands.checkpoint_diff import diff
from mlm_jax.errors import CheckpointError, ConfigError


def main(argv: list[str]) -> int:
    """mlm-jax checkpoint list --workdir DIR
    mlm-jax checkpoint verify --workdir DIR [--step N]
    mlm-jax checkpoint diff A B [--all]

    list: what is saved, when, and whether files are missing.
    verify: reads every file and compares its checksum; exit status 1 if one is damaged.
    diff: two checkpoints weight by weight, each WORKDIR or WORKDIR:STEP.
    """
    action, rest = (argv[0], argv[1:]) if argv else ("", [])
    if action in ACTIONS:
        return ACTIONS[action](rest)
    parser = command_parser("checkpoint", main.__doc__)
    parser.add_argument("action", choices=ACTIONS)
    parser.parse_args(argv)
    raise ConfigError(f"{action!r} is no action; there are {', '.join(ACTIONS)}")


def show(argv: list[str]) -> int:
    """Steps of a run: when they were saved, their size, and what is wrong at a glance."""
    parser = command_parser("checkpoint list", show.__doc__)
    parser.add_argument("--workdir", type=path, required=True, help="the folder of a run")
    args = parser.parse_args(argv)
    from mlm_jax.checkpoint.manifest import checkpoints_of, damage, shortened, steps_in

    folder = checkpoints_of(args.workdir)
    steps = [folder / str(step) for step in steps_in(folder)]
    states = {step: shortened(damage(step, read=False)) or "complete" for step in steps}
    for newest in steps[-1:]:
        states[newest] += ", the newest"
    states |= dict.fromkeys(sorted(folder.glob("*.damaged")), "damaged, and set aside")
    unfinished = "being saved, or left by a save that was killed"
    states |= dict.fromkeys(sorted(folder.glob("*.orbax-checkpoint-tmp*")), unfinished)
    try:
        rows = [(where.name, *saved(where), state) for where, state in states.items()]
    except FileNotFoundError as why:
        raise CheckpointError(f"{why.filename} has just been removed by its run") from None
    print_table([("step", "saved", "GiB", "state"), *rows])
    return 0


def verify(argv: list[str]) -> int:
    """Reads every file of the checkpoints, the settings and the tokenizer of a run.

    Exit status 1 if something is not what was written.
    """
    parser = command_parser("checkpoint verify", verify.__doc__)
    parser.add_argument("--workdir", type=path, required=True, help="the folder of a run")
    parser.add_argument("--step", type=int, help="only this checkpoint; default: all")
    args = parser.parse_args(argv)
    from mlm_jax.checkpoint.manifest import checkpoints_of, damage, require_step, steps_in
    from mlm_jax.checkpoint.workdir import damage_of_run

    folder = checkpoints_of(args.workdir)
    require_step(folder, args.step)
    steps = steps_in(folder) if args.step is None else [args.step]
    checks = {f"step {step}": partial(damage, folder / str(step)) for step in steps}
    checks["config.json and tokenizer"] = partial(damage_of_run, args.workdir)
    status = 0
    for name, check in checks.items():
        if wrong := check():
            status = 1
        print("\n  ".join([f"{name}: {'damaged' if wrong else 'whole'}", *wrong]), flush=True)
    return status


def saved(folder: Path) -> tuple[str, str]:
    """When this was written, and its GiB."""
    when = time.localtime(folder.stat().st_mtime)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return time.strftime("%Y-%m-%d %H:%M:%S", when), f"{size / 2**30:.3g}"


ACTIONS = {"list": show, "verify": verify, "diff": diff}
