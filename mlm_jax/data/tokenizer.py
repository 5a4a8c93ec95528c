"""Text to token ids and back, over the `tokenizers` library."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlm_jax.errors import DataError

END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # the first there is
# Words, numbers and punctuation with a space before them; a newline together with the indent after
# it, which in Python code is one token of its own.
PRE_TOKENS = r" ?[A-Za-z_]+| ?[0-9]+| ?[^\sA-Za-z_0-9]+|\n *|\s+(?!\S)|\s+"


class Tokenizer:
    """A vocabulary of ids 0 .. vocab_size - 1. Each instance is equal to itself only.

    eod_id is the id that ends a document, or None; `config` is the tokenizer_config.json that came
    along, or empty.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict | None = None):
        backend.no_padding()  # what a file says about them would change every text silently
        backend.no_truncation()
        self.backend, self.config = backend, config or {}
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        eos = self.config.get("eos_token")
        names = (*END_OF_DOCUMENT, eos["content"] if isinstance(eos, dict) else eos)
        ids = (backend.token_to_id(name) for name in names if name)
        self.eod_id = next((id for id in ids if id is not None), None)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """From a tokenizer.json, a folder with one, or one with GPT-2's vocab.json and merges.txt.

        Raises DataError where there is none of these, or it is damaged.
        """
        path = Path(path)
        config = (path if path.is_dir() else path.parent) / "tokenizer_config.json"
        try:
            return cls(
                read_backend(path), json.loads(config.read_bytes()) if config.exists() else {}
            )
        except DataError:
            raise
        except Exception as error:  # all that the library raises is a bare Exception
            raise DataError(f"{path}: this tokenizer cannot be read: {error}") from None

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as Hugging Face's loaders want them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config
        if self.eod_id is not None and not config.get("eos_token"):
            config["eos_token"] = self.backend.id_to_token(self.eod_id)
        self.backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether both give every text the same ids."""
        return self.backend.to_str() == other.backend.to_str()

    def encode(self, text: str) -> list[int]:
        """The ids of this text and nothing else: no BOS, no EOD."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """As encode, for many texts on all cores."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, special tokens by their names."""
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: how many bytes of UTF-8 text an id stands for; special tokens 0.

        Summed over the tokens of a text they are its size (of byte-level BPE; others change a text
        a little), so that nats a token become bits a byte, which compare across vocabularies.
        """
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


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE learned from these texts; id 0 is <|endoftext|>. Any text can be encoded.

    The vocabulary is smaller than vocab_size where the texts do not repeat themselves enough.
    Raises DataError for a vocab_size below 257: the special token and 256 bytes.
    """
    special, alphabet = END_OF_DOCUMENT[:1], pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise DataError(
            f"vocab_size={vocab_size} is less than the special token and 256 bytes: 257"
        )
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
    return Tokenizer(backend)


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
