"""mlm-jax checkpoint list"""

import time
from pathlib import Path

from mlm_jax.commands import command_parser, path, print_table
from mlm_jax.errors import CheckpointError


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


def saved(folder: Path) -> tuple[str, str]:
    """When this was written, and its GiB."""
    when = time.localtime(folder.stat().st_mtime)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return time.strftime("%Y-%m-%d %H:%M:%S", when), f"{size / 2**30:.3g}"
