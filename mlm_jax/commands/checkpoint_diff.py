"""mlm-jax checkpoint diff"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_jax.commands import command_parser, path, print_table

if TYPE_CHECKING:
    from mlm_jax.checkpoint.compare import Difference

Place = tuple[Path, int | None]  # a workdir and a step, None: the newest


def diff(argv: list[str]) -> int:
    """Two checkpoints weight by weight: kinds, largest difference, and |a - b| / |a| in 2-norms.

    A and B are each WORKDIR, for its newest checkpoint, or WORKDIR:STEP; two runs, or two steps of
    one. Layouts and numbers of devices do not matter. Both are verified first, and read one array
    at a time.
    """
    parser = command_parser("checkpoint diff", diff.__doc__)
    parser.add_argument("a", type=place, metavar="A")
    parser.add_argument("b", type=place, metavar="B")
    parser.add_argument("--all", action="store_true", help="optimizer state and step too")
    args = parser.parse_args(argv)
    from mlm_jax.checkpoint.manifest import checkpoints_of, require_step

    folders = []
    for workdir, step in (args.a, args.b):
        checkpoints = checkpoints_of(workdir)
        folders.append(checkpoints / str(require_step(checkpoints, step)))
    from mlm_jax.checkpoint.compare import Arrays, compare  # with jax

    found = list(compare(*map(Arrays, folders), weights_only=not args.all))
    for letter, folder in zip("AB", folders, strict=True):
        print(f"{letter}: {folder}")
    print()
    header = ("all" if args.all else "weight", "A", "B", "max |a-b|", "|a-b|/|a|")
    print_table([header, *map(row, found)])
    print(f"\n{summary(found)}")
    return 0


def place(text: str) -> Place:
    """runs/a, or runs/a:200."""
    workdir, _, step = text.rpartition(":")
    if not workdir or Path(text).exists():
        return path(text), None
    if not step.isdecimal():
        raise argparse.ArgumentTypeError(f"{step!r} in {text} is no step; give WORKDIR:STEP")
    return path(workdir), int(step)


def row(found: "Difference") -> tuple[str, ...]:
    a, b = (kind or "none" for kind in found.kinds)
    b = "same" if a == b else b
    if found.equal:
        return found.name, a, b, "equal", ""
    if found.largest is None:
        return found.name, a, b, "", ""
    return found.name, a, b, f"{found.largest:.3g}", f"{found.relative:.3g}"


def summary(found: "Sequence[Difference]") -> str:
    """What all rows say."""
    comparable = [d for d in found if d.largest is not None]
    most = max(comparable, key=lambda d: d.largest or 0.0, default=None)
    where = f" (most in {most.name}: {most.largest:.3g})" if most and most.largest else ""
    counts = {
        "equal bit for bit": sum(d.equal for d in found),
        f"different{where}": sum(not d.equal for d in comparable),
        "of another shape": sum(None not in d.kinds for d in found) - len(comparable),
        "only in A": sum(d.kinds[1] is None for d in found),
        "only in B": sum(d.kinds[0] is None for d in found),
    }
    told = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    return f"{len(found)} array{'s' * (len(found) != 1)}: {told}"
