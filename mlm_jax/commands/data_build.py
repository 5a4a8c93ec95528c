"""mlm-jax data build, and train-tokenizer, which reads the same inputs."""

import argparse

from mlm_jax.commands import command_parser, path
from mlm_jax.commands.train import STOPPED
from mlm_jax.errors import DataError

FILES = ".jsonl, .jsonl.gz, .jsonl.zst, .txt, .parquet; patterns in quotes; - for standard input"
TOKENIZER = (
    "tokenizer.json, vocab.json with merges.txt, SentencePiece, tiktoken or vocab.txt: its file or"
    " folder; or the word bytes"
)


def build(argv: list[str]) -> int:
    """Text to PREFIX_KEY_document.bin and .idx, as Megatron-LM's preprocess_data.py writes them.

    What is finished is kept in PREFIX.building until all is: after a kill, Ctrl-C or a full disk
    the same command goes on from there.
    """
    parser = command_parser("data build", build.__doc__)
    add_input(parser)
    parser.add_argument("--tokenizer", type=path, required=True, metavar="T", help=TOKENIZER)
    parser.add_argument("--output", type=path, required=True, metavar="PREFIX")
    parser.add_argument("--append_eod", action="store_true", help="end each document with EOD")
    parser.add_argument(
        "--split_sentences", action="store_true", help="a sequence for each; PREFIX_KEY_sentence"
    )
    parser.add_argument("--workers", type=int, help="processes; default: the cores there are")
    parser.add_argument(
        "--on_error", choices=("stop", "skip"), default="stop",
        help="skip: pass over documents that cannot be used, and count them",
    )  # fmt: skip
    parser.add_argument(
        "--max_document_bytes", type=int, default=1 << 30, metavar="N",
        help="longer lines, rows or text files cannot be used; default: 1 GiB",
    )  # fmt: skip
    args = parser.parse_args(argv)
    from mlm_jax.data.preprocess.build import build as write
    from mlm_jax.data.preprocess.progress import Stopped
    from mlm_jax.data.tokenizer.batch_encoder import threads

    try:
        counts = write(
            **vars(args) | {"workers": threads() if args.workers is None else args.workers}
        )
    except Stopped:
        print("stopped on request. The same command goes on with what is not finished.")
        return STOPPED
    skipped = f", {counts.skipped:,} skipped" if counts.skipped else ""
    print(f"{counts.documents:,} documents{skipped}, {counts.tokens:,} tokens, ", end="")
    print(f"{counts.text_bytes:,} bytes")
    level = "sentence" if args.split_sentences else "document"
    for key in args.json_keys:
        print(f"--config.data.path={args.output}_{key}_{level}")
    return 0


def train_tokenizer(argv: list[str]) -> int:
    """Byte-level BPE learned from texts: FOLDER/tokenizer.json, which can encode any text.

    All of the input is read; of a large corpus some files, a few GB in all, teach as much.
    """
    parser = command_parser("data train-tokenizer", train_tokenizer.__doc__)
    add_input(parser)
    parser.add_argument("--vocab_size", type=int, required=True, metavar="N")
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER")
    args = parser.parse_args(argv)
    from mlm_jax.data.preprocess.documents import read_texts
    from mlm_jax.data.tokenizer.training import train_bpe

    if args.output.exists():
        raise DataError(f"{args.output}: already exists; remove it or choose another output")
    tokenizer = train_bpe(read_texts(args.inputs, args.json_keys), args.vocab_size)
    tokenizer.save(args.output)
    print(f"{tokenizer.vocab_size:,} ids; --tokenizer {args.output}")
    return 0


def add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", dest="inputs", nargs="+", action="extend", required=True, metavar="FILE",
        help=FILES,
    )  # fmt: skip
    parser.add_argument(
        "--json_keys", nargs="+", default=["text"], metavar="KEY",
        help="of texts in a JSON line, or columns of parquet; default: text",
    )  # fmt: skip
