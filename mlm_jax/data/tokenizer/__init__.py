"""Text to token ids and back: what every tokenizer can do, and how a file becomes one."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

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


class Tokenizer(Protocol):
    """A vocabulary of ids 0 .. vocab_size - 1, and how text becomes ids. Equal to itself only.

    vocab_size counts the added tokens, but no padding, which is the model's. eod_id is the id that
    ends a document, or None; `config` is the tokenizer_config.json that came along, with the chat
    template; `special` has the ids of bos, eos, unk, pad, cls, sep and mask, as far as there are.
    """

    vocab_size: int
    eod_id: int | None
    config: Mapping[str, Any]
    special: Mapping[str, int]

    def encode(self, text: str) -> list[int]:
        """The ids of this text and nothing else: no BOS, no EOD."""
        ...

    def encode_many(self, texts: Sequence[str]) -> Sequence[ArrayLike]:
        """As encode, for many texts, each an int32 array: on RAYON_NUM_THREADS, else all cores."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, special tokens by their names."""
        ...

    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact name, special or not."""
        ...

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: how many bytes of UTF-8 text an id stands for; special tokens 0.

        Summed over the tokens of a text they are its size (of byte-level BPE; others change a text
        a little), so that nats a token become bits a byte, which compare across vocabularies.
        """
        ...

    def continues_word(self) -> np.ndarray:
        """bool [vocab_size]: whether an id goes on with the word before it, for whole-word masking.

        Where a vocabulary marks that a word goes on (WordPiece's ##), those with the mark; where it
        has the space in the token, those that begin with none. Never a special token.
        """
        ...

    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of all that decides which ids a text gets."""
        ...

    def save(self, folder: Path | str) -> None:
        """Writes the files that load_tokenizer(folder) reads; tokenizer_config.json comes last."""
        ...

    def same_as(self, other: object) -> bool:
        """Whether both give every text the same ids."""
        ...


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
    config = read_config(file.parent)
    try:
        return read(file, config)
    except DataError as error:
        why = str(error) if str(file) in str(error) else f"{file}: {error}"
    except Exception as error:  # all that the libraries raise is a bare Exception
        why = f"{file}: this tokenizer cannot be read: {error}; {WANTED}"
    raise DataError(why)


def find(folder: Path) -> Path:
    for name in NAMES:
        files = sorted(folder.glob(name))
        if len(files) > 1:
            some = ", ".join(file.name for file in files)
            raise DataError(f"{folder}: holds several tokenizers, {some}; give the file")
        if files:
            return files[0]
    raise DataError(f"{folder}: no such file in it; {WANTED}")


def read(file: Path, config: dict[str, Any]) -> Tokenizer:
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
