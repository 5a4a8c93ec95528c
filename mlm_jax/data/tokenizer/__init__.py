"""Text to token ids and back: how a file becomes a tokenizer."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm_jax.data.tokenizer.base import Tokenizer
from mlm_jax.data.tokenizer.fast import FastTokenizer
from mlm_jax.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from mlm_jax.data.tokenizer.settings import END_OF_DOCUMENT, read_config
from mlm_jax.data.tokenizer.tiktoken_file import read_tiktoken
from mlm_jax.data.tokenizer.vocabulary_files import (
    bytes_backend,
    read_json,
    read_merges,
    read_wordpiece,
)
from mlm_jax.errors import DataError

__all__ = ["END_OF_DOCUMENT", "Tokenizer", "load_tokenizer"]

# In a folder the first of these counts: of several kinds, tokenizer.json says most.
NAMES = (
    "tokenizer.json", "*vocab.json", "tokenizer.model", "*.model", "*.tiktoken", "*vocab.txt",
)  # fmt: skip
WANTED = (
    "give a tokenizer.json, a folder with it or with vocab.json and merges.txt, a SentencePiece"
    " .model, a tiktoken file, BERT's vocab.txt, or the word bytes"
)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in a file or folder, known by its content where the name does not say.

    Hugging Face's tokenizer.json; GPT-2's vocab.json and merges.txt; a SentencePiece model; a
    tiktoken file (as Llama 3's tokenizer.model is one); BERT's vocab.txt; or, unless there is a
    path of that name, the word `bytes`: 256 ids and one for the end of a document.

    Raises DataError where there is none of these, or it is damaged.
    """
    path = Path(path)
    if str(path) == "bytes" and not path.exists():
        return FastTokenizer(bytes_backend())
    file = find(path) if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: no such file; {WANTED}")
    try:
        return read(file, read_config(file.parent))
    except Exception as error:  # all that the libraries raise is a bare Exception
        raise DataError(f"{file}: this tokenizer cannot be read: {error}") from error


def find(folder: Path) -> Path:
    for name in NAMES:
        files = sorted(folder.glob(name))
        if len(files) > 1:
            some = ", ".join(file.name for file in files)
            raise DataError(f"{folder}: holds several tokenizers, {some}; give the file")
        if files:
            return files[0]
    raise DataError(f"{folder}: no such file in it; {WANTED}")


def read(file: Path, config: Mapping[str, Any]) -> Tokenizer:
    with file.open("rb") as content:
        head = content.read(4096)
    first_line = head.lstrip().split(b"\n")[0]
    if file.name.endswith(("vocab.json", "merges.txt")):
        reader = read_merges
    elif file.suffix == ".json" or first_line.startswith(b"{"):
        reader = read_json
    elif file.suffix == ".tiktoken" or re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", first_line):
        reader = read_tiktoken
    elif file.suffix == ".txt":
        reader = read_wordpiece
    else:
        return SentencePieceTokenizer(file.read_bytes(), config)
    return FastTokenizer(reader(file, config), config)
