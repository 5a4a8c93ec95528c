"""mlm-jax convert from-megatron-args"""

import sys

from mlm_jax.commands import command_parser, path
from mlm_jax.errors import ConfigError


def from_megatron_args(argv: list[str]) -> int:
    """A config file, on stdout, from the launch script of a Megatron-LM run, or a file of flags.

    The script is read, not run. Flags that could not be carried over are listed, each with the
    reason, on stderr and at the end of the file.

    mlm-jax convert from-megatron-args pretrain.sh > config.py
    """
    parser = command_parser("convert from-megatron-args", from_megatron_args.__doc__)
    parser.add_argument("script", type=path, help="-: stdin")
    parser.add_argument("--gpus", type=int, metavar="N", help="where the script does not say")
    args = parser.parse_args(argv)
    if args.gpus is not None and args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus} is no number of GPUs; give 1 or more")
    from mlm_jax.checkpoint.megatron_run import config_text, told, translate

    stdin = str(args.script) == "-"
    try:
        script = sys.stdin.read() if stdin else args.script.read_text()
    except (OSError, UnicodeDecodeError) as why:
        raise ConfigError(f"{args.script} is no text that can be read: {why}") from None
    found = translate(script, args.gpus)
    print(config_text(found, "stdin" if stdin else args.script.name), end="")
    if found.lost:
        lines = "\n  ".join(told(found, found.lost))
        print(f"mlm-jax: not carried over:\n  {lines}", file=sys.stderr)
    return 0
