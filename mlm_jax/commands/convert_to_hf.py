"""mlm-jax convert to-hf"""

from mlm_jax.commands import command_parser, path


def to_hf(argv: list[str]) -> int:
    """mlm-jax convert to-hf DIR --workdir W [--step N] [--dtype NAME]

    Writes the model of a run as transformers reads it: config.json, *.safetensors, tokenizer.
    """
    parser = command_parser("convert to-hf", to_hf.__doc__)
    parser.add_argument("folder", type=path, metavar="DIR", help="a new folder")
    parser.add_argument("--workdir", type=path, required=True, help="the folder of a run")
    parser.add_argument("--step", type=int, help="checkpoint; default: the newest")
    parser.add_argument(
        "--dtype", help="of the tensors: float32, bfloat16, ...; default: the least that is exact"
    )
    args = parser.parse_args(argv)
    from mlm_jax.checkpoint.aside import require_new
    from mlm_jax.checkpoint.hf_export import to_hf as write
    from mlm_jax.checkpoint.workdir import load

    require_new(args.folder, 0)
    write(load(args.workdir, args.step), args.folder, args.dtype)
    print(f"{args.folder} holds the model.")
    return 0
