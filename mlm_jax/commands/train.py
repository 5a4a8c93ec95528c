"""mlm-jax train"""

from mlm_jax.commands import add_config, command_parser, parse, path
from mlm_jax.distributed import lead
from mlm_jax.door import load_config
from mlm_jax.host import keep_freed_memory, set_xla_flags
from mlm_jax.profiling import Span
from mlm_jax.stop import StopSignals

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again


def main(argv: list[str]) -> int:
    """mlm-jax train --config SPEC --workdir DIR [--profile A:B] [--config.KEY=VALUE ...]

    Trains, and writes metrics, checkpoints and a report into DIR. Run again with the same DIR it
    resumes. SIGTERM or Ctrl-C: saves, and exits with 75; a second one leaves at once. Over several
    processes: `bash launch/local.sh N -- mlm-jax train ...`, or under srun or mpirun.
    """
    parser = command_parser("train", main.__doc__)
    add_config(parser)
    parser.add_argument("--workdir", type=path, required=True, help="where the run lives")
    parser.add_argument(
        "--profile", metavar="A:B", type=Span.parse,
        help="trace the steps A to B-1 into DIR/profile, with a table of their operations",
    )  # fmt: skip
    args, overrides = parse(parser, argv)
    run = load_config(args.config, overrides)
    keep_freed_memory()
    set_xla_flags(run.train.xla)
    with StopSignals() as stop:
        from mlm_jax.loop import train  # jax comes in here: --help and bad settings answer at once
        from mlm_jax.summary import summary

        outcome = train(run, args.workdir, stop, args.profile)
    if outcome.stopped:
        where = f"saved at step {outcome.saved}. The same command goes on from there"
        where = where if outcome.saved else "nothing was saved yet. The same command begins anew"
        if lead():
            print(f"stopped on request; {where}.")
        return STOPPED
    if lead():
        print(summary(args.workdir))
    return 0
