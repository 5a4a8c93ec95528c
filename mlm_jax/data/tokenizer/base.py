"""What every tokenizer can do."""

import abc
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlm_jax.data.tokenizer.settings import BERT, END_OF_DOCUMENT, ROLES, name_of


class Tokenizer(abc.ABC):
    """A vocabulary of ids 0 .. vocab_size - 1, and how text becomes ids. Equal to itself only.

    vocab_size counts the added tokens, but no padding, which is the model's; `config` is the
    tokenizer_config.json that came along, with the chat template; `special` has the ids of bos,
    eos, unk, pad, cls, sep and mask, as far as there are.

    eod_id ends a document: one of END_OF_DOCUMENT, else EOS, else SEP, else None. SEP is BERT's: it
    has no EOS, and Megatron's HuggingFaceTokenizer takes SEP there. (Megatron's older BertWordPiece
    adds an [EOS] behind the vocabulary, which no published weights know.)
    """

    def __init__(self, vocab_size: int, config: Mapping[str, Any], own: Mapping[str, int]):
        """own: ids of the roles that the tokenizer's own file names; the config's come first."""
        named = {role: self.id_of(name_of(config, role) or BERT.get(role, "")) for role in ROLES}
        special = {**own, **{role: id for role, id in named.items() if id is not None}}
        ends = {name: id for name in END_OF_DOCUMENT if (id := self.id_of(name)) is not None}
        end, self.eod_id = next(iter(ends.items()), (None, special.get("eos", special.get("sep"))))
        if end and self.eod_id is not None and not {"eos", "sep"} & special.keys():
            # Hugging Face's loaders know the end of a document by this role alone.
            config, special["eos"] = {**config, "eos_token": end}, self.eod_id
        self.vocab_size, self.config, self.special = vocab_size, config, special

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of this text and nothing else: no BOS, no EOD."""

    def prompt(self, text: str) -> list[int]:
        """The ids of a text that a model is to continue: with a BOS, where this adds one."""
        return self.encode(text)

    @abc.abstractmethod
    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As encode, for many texts, each an int32 array: on RAYON_NUM_THREADS, else all cores."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, special tokens by their names."""

    @abc.abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact name, special or not."""

    @abc.abstractmethod
    def texts(self) -> Mapping[int, bytes]:
        """The UTF-8 that an id stands for, with the space before it; special tokens have none."""

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: how many bytes of UTF-8 text an id stands for; special tokens 0.

        Summed over the tokens of a text they are its size (of byte-level BPE; others change a text
        a little), so that nats a token become bits a byte, which compare across vocabularies.
        """
        sizes = np.zeros(self.vocab_size, np.int32)
        for id, text in self.texts().items():
            sizes[id] = len(text)
        return sizes

    def continues_word(self) -> np.ndarray:
        """bool [vocab_size]: whether an id goes on with the word before it, for whole-word masking.

        Those that begin with no space; WordPiece's, those with its mark (##). No special token.
        """
        continues = np.zeros(self.vocab_size, bool)
        for id, text in self.texts().items():
            continues[id] = not text[:1].isspace()
        return continues

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of all that decides which ids a text gets."""

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether both give every text the same ids."""
        return self.fingerprint() == other.fingerprint()

    @abc.abstractmethod
    def write_model(self, folder: Path) -> None:
        """Writes the file that load_tokenizer(folder) reads."""

    def save(self, folder: Path | str) -> None:
        """Writes that file, then tokenizer_config.json: a folder that has it is complete."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.write_model(folder)
        text = json.dumps(self.config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
