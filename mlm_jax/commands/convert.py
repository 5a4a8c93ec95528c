"""mlm-jax convert"""

from mlm_jax.commands import command_parser
from mlm_jax.commands.convert_from_hf import from_hf
from mlm_jax.commands.convert_to_hf import to_hf
from mlm_jax.errors import ConfigError


def main(argv: list[str]) -> int:
    """mlm-jax convert from-hf DIR --workdir W [--config.layout.KEY=VALUE ...]
    mlm-jax convert to-hf DIR --workdir W [--step N] [--dtype NAME]

    from-hf: a model saved by transformers becomes a workdir.
    to-hf: the model of a workdir, as transformers reads it.
    """
    action, rest = (argv[0], argv[1:]) if argv else ("", [])
    if action in ACTIONS:
        return ACTIONS[action](rest)
    parser = command_parser("convert", main.__doc__)
    parser.add_argument("action", choices=ACTIONS)
    parser.parse_args(argv)
    raise ConfigError(f"{action!r} is no action; there are {', '.join(ACTIONS)}")


ACTIONS = {"from-hf": from_hf, "to-hf": to_hf}
