"""mlm-jax convert from-megatron"""

from mlm_jax.commands import check_only_layout, command_parser, layout_asked_for, parse, path
from mlm_jax.config import RunConfig
from mlm_jax.errors import ConfigError


def from_megatron(argv: list[str]) -> int:
    """mlm-jax convert from-megatron DIR --workdir W [--tokenizer T] [--config.layout.KEY=VALUE ...]

    A checkpoint of Megatron-LM, of a GPT or Llama-style model, becomes a workdir. Both formats are
    read, torch_dist and a file a rank, whatever TP and PP they were saved with. Of DIR, which
    Megatron-LM saved to, the newest checkpoint counts; DIR may be an iter_ folder, too. Optimizer
    state does not come along. Needs torch: pip install 'mlm_jax[megatron]'.
    """
    parser = command_parser("convert from-megatron", from_megatron.__doc__)
    parser.add_argument("folder", type=path, metavar="DIR")
    parser.add_argument("--workdir", type=path, required=True, help="a new folder")
    parser.add_argument("--tokenizer", type=path, metavar="T", help="tokenizer.json, or a folder")
    parser.add_argument(
        "--script", type=path, help="that started the run, for a checkpoint without arguments"
    )
    args, overrides = parse(parser, argv)
    check_only_layout(overrides)
    try:
        script = args.script.read_text() if args.script else None
    except (OSError, UnicodeDecodeError) as why:
        raise ConfigError(f"{args.script} is no text that can be read: {why}") from None
    from mlm_jax.checkpoint.aside import require_new
    from mlm_jax.checkpoint.convert import write_converted
    from mlm_jax.checkpoint.megatron import MegatronFolder
    from mlm_jax.checkpoint.megatron_args import of_script

    require_new(args.workdir, 0)
    source = MegatronFolder(args.folder, args.tokenizer, of_script(script)[0] if script else None)
    run = RunConfig(model=source.model, name=args.folder.absolute().name)
    params = source.params(source.model, layout_asked_for(run, overrides))
    write_converted(args.workdir, run, params, source.tokenizer, source.origin)
    without = "" if source.tokenizer else ", without a tokenizer: text needs one, token ids do not"
    print(f"{args.workdir} holds the model{without}.")
    return 0
