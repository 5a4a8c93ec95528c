"""mlm-jax checkpoint"""

from functools import partial

from mlm_jax.commands import command_parser, path
from mlm_jax.commands.checkpoint_diff import diff
from mlm_jax.commands.checkpoint_list import show
from mlm_jax.errors import ConfigError


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


ACTIONS = {"list": show, "verify": verify, "diff": diff}
