"""Text to token ids and back, over the `tokenizers` library."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import ArrayLike
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlm_jax.errors import DataError

ROLES = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")
END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # the first there is
# Words, numbers and punctuation with a space before them; a newline together with the indent after
# it, which in Python code is one token of its own.
PRE_TOKENS = r" ?[A-Za-z_]+| ?[0-9]+| ?[^\sA-Za-z_0-9]+|\n *|\s+(?!\S)|\s+"


class Tokenizer(Protocol):
    """A vocabulary of ids 0 .. vocab_size - 1, and how text becomes ids. Equal to itself only.

    eod_id is the id that ends a document, or None; `config` is the tokenizer_config.json that came
    along, or empty; `special` has the ids of those of bos, eos, unk, pad, cls, sep and mask that
    the config names.
    """

    vocab_size: int
    eod_id: int | None
    config: Mapping[str, Any]
    special: Mapping[str, int]

    def encode(self, text: str) -> list[int]:
        """The ids of this text and nothing else: no BOS, no EOD."""
        ...

    def encode_many(self, texts: Sequence[str]) -> Sequence[ArrayLike]:
        """As encode, for many texts on all cores."""
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

    def save(self, folder: Path | str) -> None:
        """Writes the files that load_tokenizer(folder) reads, and tokenizer_config.json."""
        ...

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether both give every text the same ids."""
        ...


def load_tokenizer(path: Path | str) -> Tokenizer:
    """From a tokenizer.json, a folder with one, or one with GPT-2's vocab.json and merges.txt.

    Raises DataError where there is none of these, or it is damaged.
    """
    path = Path(path)
    config = (path if path.is_dir() else path.parent) / "tokenizer_config.json"
    try:
        settings = json.loads(config.read_bytes()) if config.exists() else {}
        return FastTokenizer(read_backend(path), settings)
    except DataError:
        raise
    except Exception as error:  # all that the library raises is a bare Exception
        raise DataError(f"{path}: this tokenizer cannot be read: {error}") from None


class FastTokenizer:
    """A Tokenizer over the `tokenizers` library."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None):
        backend.no_padding()  # what a file says about them would change every text silently
        backend.no_truncation()
        self.backend, self.config = backend, dict(config or {})
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        named = {role: self.config.get(f"{role}_token") for role in ROLES}
        named = {r: n["content"] if isinstance(n, dict) else n for r, n in named.items()}
        found = {role: self.id_of(name) for role, name in named.items() if name}
        self.special = {role: id for role, id in found.items() if id is not None}
        ends = (self.id_of(name) for name in END_OF_DOCUMENT)
        self.eod_id = next((id for id in ends if id is not None), self.special.get("eos"))

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as Hugging Face's loaders want them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config
        if self.eod_id is not None and not config.get("eos_token"):
            config["eos_token"] = self.backend.id_to_token(self.eod_id)
        self.backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def same_as(self, other: Tokenizer) -> bool:
        same_kind = isinstance(other, FastTokenizer)
        return same_kind and self.backend.to_str() == other.backend.to_str()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int32)
        added = self.backend.get_added_tokens_decoder()
        size_of = len if "ByteLevel" in repr(self.backend.decoder) else self._decoded_size
        for token, id in self.backend.get_vocab(with_added_tokens=True).items():
            if id not in added:
                sizes[id] = size_of(token)  # byte-level: one character a byte
            elif not added[id].special:
                sizes[id] = len(token.encode())
        return sizes

    def _decoded_size(self, token: str) -> int:
        if re.fullmatch("<0x[0-9A-F]{2}>", token):  # what SentencePiece falls back to
            return 1
        decoder = self.backend.decoder or decoders.WordPiece(cleanup=False)  # it joins by spaces
        # Behind another token, for decoders drop a space at the beginning of a text.
        alone, behind = (decoder.decode(tokens) for tokens in (["a"], ["a", token]))
        return len(behind.encode()) - len(alone.encode())


def train_bpe(
    texts: Iterable[str], vocab_size: int, special: Sequence[str] = END_OF_DOCUMENT[:1]
) -> FastTokenizer:
    """Byte-level BPE learned from these texts; any text can be encoded.

    special: tokens with the ids 0, 1, ..., found in a text by their names; by default the end of a
    document alone.

    The vocabulary is smaller than vocab_size where the texts do not repeat themselves enough.
    Raises DataError for a vocab_size below len(special) + 256 bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < (least := len(special) + len(alphabet)):
        kinds = f"the {len(special)} special tokens" if len(special) > 1 else "the special token"
        raise DataError(f"vocab_size={vocab_size} is less than {kinds} and 256 bytes: {least}")
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return FastTokenizer(backend)


def read_backend(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        return tokenizers.Tokenizer.from_file(str(file))
    vocab, merges = path / "vocab.json", path / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        wanted = "give a tokenizer.json, or a folder with it or with vocab.json and merges.txt"
        raise DataError(f"{file}: no such file; {wanted}")
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([t for t in END_OF_DOCUMENT if backend.token_to_id(t) is not None])
    return backend
