"""mlm-jax data"""

from mlm_jax.commands import command_parser, path
from mlm_jax.errors import ConfigError, DataError


def main(argv: list[str]) -> int:
    """mlm-jax data build --input FILE ... --tokenizer T --output PREFIX [--append_eod]
    mlm-jax data inspect PREFIX [--tokenizer T]

    build: JSON lines or plain text to Megatron-LM's PREFIX_text_document.bin and .idx.
    inspect: what such a pair holds, and whether it is whole.
    """
    action, rest = (argv[0], argv[1:]) if argv else ("", [])
    if action in ACTIONS:
        return ACTIONS[action](rest)
    parser = command_parser("data", main.__doc__)
    parser.add_argument("action", choices=ACTIONS)
    parser.parse_args(argv)
    raise ConfigError(f"{action!r} is no action; there are {', '.join(ACTIONS)}")


def build(argv: list[str]) -> int:
    """Text to PREFIX_KEY_document.bin and .idx, as Megatron-LM's preprocess_data.py writes them."""
    parser = command_parser("data build", build.__doc__)
    parser.add_argument(
        "--input", nargs="+", action="extend", type=path, required=True, help=".jsonl or .txt files"
    )
    parser.add_argument(
        "--tokenizer", type=path, required=True, help="tokenizer.json or its folder"
    )
    parser.add_argument("--output", type=path, required=True, metavar="PREFIX")
    parser.add_argument("--json_key", default="text", help="key of the text in a JSON line")
    parser.add_argument("--append_eod", action="store_true", help="end each document with EOD")
    args = parser.parse_args(argv)
    from mlm_jax.data.preprocess import build as write
    from mlm_jax.data.tokenizer import load_tokenizer

    counts = write(
        args.input, load_tokenizer(args.tokenizer), args.output, json_key=args.json_key,
        append_eod=args.append_eod,
    )  # fmt: skip
    print(f"{counts.documents:,} documents, {counts.tokens:,} tokens, {counts.text_bytes:,} bytes")
    print(f"--config.data.path={args.output}_{args.json_key}_document")
    return 0


def inspect(argv: list[str]) -> int:
    """Documents, tokens and lengths of PREFIX.bin and .idx; with a tokenizer, the first words."""
    parser = command_parser("data inspect", inspect.__doc__)
    parser.add_argument("prefix", type=path)
    parser.add_argument("--tokenizer", type=path, help="tokenizer.json or its folder")
    args = parser.parse_args(argv)
    from mlm_jax.data.indexed import IndexedDataset
    from mlm_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    indexed = IndexedDataset(args.prefix)
    lengths = sorted(indexed.lengths.tolist())
    print(f"{len(indexed.documents) - 1:,} documents, {len(indexed):,} sequences")
    print(f"{indexed.n_tokens:,} tokens as {indexed.dtype}")
    if lengths:
        middle, most = lengths[len(lengths) // 2], lengths[-1]
        print(f"lengths: {lengths[0]:,} least, {middle:,} median, {most:,} most")
    for n in range(min(3, len(indexed)) if tokenizer else 0):
        assert tokenizer is not None
        ids = indexed.tokens(n, 0, 32)
        if indexed.dtype.kind not in "iu" or not all(0 <= i < tokenizer.vocab_size for i in ids):
            raise DataError(f"{args.prefix}.bin was not built with {args.tokenizer}: [{n}] {ids}")
        print(f"[{n}] {tokenizer.decode(ids)!r}")
    return 0


ACTIONS = {"build": build, "inspect": inspect}
