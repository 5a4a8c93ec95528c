"""mlm-jax convert from-hf"""

from mlm_jax.commands import check_only_layout, command_parser, layout_asked_for, parse, path


def from_hf(argv: list[str]) -> int:
    """mlm-jax convert from-hf DIR --workdir W [--config.layout.KEY=VALUE ...]

    A model saved by transformers becomes a workdir, which generate, train --config.init_from and
    all else take. Weights are read tensor by tensor, straight into the layout.
    """
    parser = command_parser("convert from-hf", from_hf.__doc__)
    parser.add_argument("folder", type=path, metavar="DIR", help="config.json, *.safetensors, ...")
    parser.add_argument("--workdir", type=path, required=True, help="a new folder")
    args, overrides = parse(parser, argv)
    check_only_layout(overrides)
    from flax import nnx

    from mlm_jax.checkpoint.aside import require_new
    from mlm_jax.checkpoint.convert import write_converted
    from mlm_jax.checkpoint.hf import HfFolder
    from mlm_jax.checkpoint.hf import from_hf as read

    require_new(args.workdir, 0)
    run = HfFolder(args.folder).run
    model = read(args.folder, layout_asked_for(run, overrides))
    params = nnx.state(model, nnx.Param)
    write_converted(args.workdir, run, params, model.tokenizer, model.origin)
    without = "" if model.tokenizer else ", without a tokenizer: text needs one, token ids do not"
    print(f"{args.workdir} holds the model{without}.")
    return 0
