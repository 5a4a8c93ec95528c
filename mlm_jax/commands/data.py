"""mlm-jax data"""

import logging

from mlm_jax.commands import command_parser, path
from mlm_jax.commands.data_build import TOKENIZER, build, train_tokenizer
from mlm_jax.errors import ConfigError

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """mlm-jax data build --input FILE ... --tokenizer T --output PREFIX [--workers N ...]
    mlm-jax data merge --input PREFIX ... --output PREFIX
    mlm-jax data inspect PREFIX [--tokenizer T]
    mlm-jax data train-tokenizer --input FILE ... --vocab_size N --output FOLDER

    build: JSON lines, plain text or parquet to Megatron-LM's PREFIX_text_document.bin and .idx.
    merge: several such pairs to one.
    inspect: what such a pair holds, and whether it is whole.
    train-tokenizer: byte-level BPE.
    """
    action, rest = (argv[0], argv[1:]) if argv else ("", [])
    if action in ACTIONS:
        return ACTIONS[action](rest)
    parser = command_parser("data", main.__doc__)
    parser.add_argument("action", choices=ACTIONS)
    parser.parse_args(argv)
    raise ConfigError(f"{action!r} is no action; there are {', '.join(ACTIONS)}")


def merge(argv: list[str]) -> int:
    """The documents of several pairs of token files, one pair after the other, in one pair."""
    parser = command_parser("data merge", merge.__doc__)
    parser.add_argument(
        "--input", nargs="+", action="extend", type=path, required=True, metavar="PREFIX"
    )
    parser.add_argument("--output", type=path, required=True, metavar="PREFIX")
    args = parser.parse_args(argv)
    from mlm_jax.data.indexed import IndexedDataset
    from mlm_jax.data.indexed_writer import merge as write

    dtype = write(args.input, args.output)
    for prefix in args.input:
        if (before := IndexedDataset(prefix).dtype) != dtype:
            log.info("%s: its %s tokens have become %s", prefix, before, dtype)
    merged = IndexedDataset(args.output)
    print(f"{len(merged.documents) - 1:,} documents, {merged.n_tokens:,} tokens as {dtype}")
    print(f"--config.data.path={args.output}")
    return 0


def inspect(argv: list[str]) -> int:
    """Documents, tokens and lengths of PREFIX.bin and .idx; with a tokenizer, the first words."""
    parser = command_parser("data inspect", inspect.__doc__)
    parser.add_argument("prefix", type=path)
    parser.add_argument("--tokenizer", type=path, metavar="T", help=TOKENIZER)
    args = parser.parse_args(argv)
    from mlm_jax.data.contents import describe
    from mlm_jax.data.tokenizer import load_tokenizer

    for line in describe(args.prefix, load_tokenizer(args.tokenizer) if args.tokenizer else None):
        print(line)
    return 0


ACTIONS = {
    "build": build, "merge": merge, "inspect": inspect, "train-tokenizer": train_tokenizer,
}  # fmt: skip
