"""mlm-jax generate"""

import sys

from mlm_jax.commands import (
    check_only_layout,
    command_parser,
    layout_asked_for,
    parse,
    path,
)
from mlm_jax.errors import ConfigError


def main(argv: list[str]) -> int:
    """mlm-jax generate (--workdir DIR | --hf DIR) --prompt TEXT [--prompt TEXT ...] [options]

    Prints each prompt with its continuation.
    """
    parser = command_parser("generate", main.__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", type=path, help="the folder of a run, or a converted model")
    which.add_argument("--hf", type=path, metavar="DIR", help="a model saved by transformers")
    parser.add_argument(
        "--prompt", action="append", required=True, help="may be given several times"
    )
    parser.add_argument("--max_tokens", type=int, default=64, help="new tokens, 64")
    parser.add_argument("--temperature", type=float, help="0.8; 0 is greedy; with beams 0")
    parser.add_argument("--top_k", type=int, default=0, help="most likely tokens to choose from")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="share of probability to choose from"
    )
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1: repeats less"
    )
    parser.add_argument("--beams", type=int, default=1, help="of a search for the likeliest text")
    parser.add_argument(
        "--length_penalty", type=float, default=1.0, help="above 1: beams prefer longer texts"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts")
    parser.add_argument("--stop", action="append", default=[], help="end before this text")
    parser.add_argument("--step", type=int, help="checkpoint; default: the newest")
    args, overrides = parse(parser, argv)
    check_only_layout(overrides)
    if args.hf and args.step is not None:
        raise ConfigError(f"--step={args.step} is of a run; {args.hf} has one set of weights")
    from mlm_jax.checkpoint.hf import HfFolder, from_hf
    from mlm_jax.checkpoint.workdir import load, read_run
    from mlm_jax.inference.engine import generate

    run = HfFolder(args.hf).run if args.hf else read_run(args.workdir)
    layout = layout_asked_for(run, overrides)
    model = from_hf(args.hf, layout) if args.hf else load(args.workdir, args.step, layout)
    texts = generate(
        model, args.prompt, max_tokens=args.max_tokens, temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, repetition_penalty=args.repetition_penalty,
        seed=args.seed, stop=args.stop,
        beams=args.beams, length_penalty=args.length_penalty,
    )  # fmt: skip
    for i, (prompt, text) in enumerate(zip(args.prompt, texts, strict=True)):
        if i:
            print("-" * 40)
        sys.stdout.write(prompt + text + "\n")
    return 0
