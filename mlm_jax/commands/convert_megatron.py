"""mlm-jax convert from-megatron"""

from mlm_jax.commands import command_parser, path
from mlm_jax.errors import ConfigError


def from_megatron(argv: list[str]) -> int:
    """A workdir from a checkpoint of Megatron-LM: a GPT or Llama-style model, whatever TP and PP.

    Both formats are read: torch_dist, and a file a rank (mp_rank_00/model_optim_rng.pt). DIR is the
    folder Megatron-LM saved to, whose newest checkpoint counts, or an iter_ folder. Optimizer state
    does not come along: train with --config.init_from=W. Needs torch: pip install mlm_jax[megatron].

    mlm-jax convert from-megatron DIR --workdir W --tokenizer tokenizer.json
    """
    parser = command_parser("convert from-megatron", from_megatron.__doc__)
    parser.add_argument("folder", type=path, metavar="DIR")
    parser.add_argument("--workdir", type=path, required=True, help="new or empty")
    parser.add_argument(
        "--tokenizer", type=path, help="file or folder; without, the arguments tell the vocabulary"
    )
    parser.add_argument(
        "--script", type=path, help="that started the run; its flags win over the arguments saved"
    )
    args = parser.parse_args(argv)
    from mlm_jax.checkpoint.convert import write_converted
    from mlm_jax.checkpoint.megatron import MegatronFolder
    from mlm_jax.checkpoint.megatron_args import of_script

    try:
        flags = of_script(args.script.read_text())[0] if args.script else None
    except (OSError, UnicodeDecodeError) as why:
        raise ConfigError(f"{args.script} is no text that can be read: {why}") from None
    source = MegatronFolder(args.folder, args.tokenizer, flags)
    write_converted(args.workdir, source)
    print(args.workdir)
    return 0
