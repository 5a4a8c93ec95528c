"""mlm-jax convert"""

from mlm_jax.commands import command_parser
from mlm_jax.commands.convert_from_hf import from_hf
from mlm_jax.commands.convert_megatron import from_megatron
from mlm_jax.commands.convert_megatron_args import from_megatron_args
from mlm_jax.commands.convert_to_hf import to_hf
from mlm_jax.errors import ConfigError


def main(argv: list[str]) -> int:
    """mlm-jax convert from-hf DIR --workdir W [--config.layout.KEY=VALUE ...]
    mlm-jax convert to-hf DIR --workdir W [--step N] [--dtype NAME]
    mlm-jax convert from-megatron DIR --workdir W [--tokenizer T] [--config.layout.KEY=VALUE ...]
    mlm-jax convert from-megatron-args SCRIPT [--gpus N] > config.py

    from-hf: a model saved by transformers becomes a workdir.
    to-hf: the model of a workdir, as transformers reads it.
    from-megatron: a checkpoint of Megatron-LM, of a GPT or Llama-style model, becomes a workdir.
    from-megatron-args: a launch script of Megatron-LM becomes a config file.
    """
    action, rest = (argv[0], argv[1:]) if argv else ("", [])
    if action in ACTIONS:
        return ACTIONS[action](rest)
    parser = command_parser("convert", main.__doc__)
    parser.add_argument("action", choices=ACTIONS)
    parser.parse_args(argv)
    raise ConfigError(f"{action!r} is no action; there are {', '.join(ACTIONS)}")


ACTIONS = {
    "from-hf": from_hf, "to-hf": to_hf, "from-megatron": from_megatron,
    "from-megatron-args": from_megatron_args,
}  # fmt: skip
