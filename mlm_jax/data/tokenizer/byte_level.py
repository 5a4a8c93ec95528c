"""Byte-level vocabularies: each byte is written as one printable character, as in GPT-2."""

from collections.abc import Mapping, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

# Printable bytes stand for themselves, the other 68 for the characters from U+0100 on, in order.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE}
_CHARACTER |= {byte: chr(0x100 + n) for n, byte in enumerate(_OTHERS)}
_BYTE = {character: byte for byte, character in _CHARACTER.items()}


def characters(token: bytes) -> str:
    """How a vocabulary writes this token: one character a byte."""
    return "".join(_CHARACTER[byte] for byte in token)


def token_of(text: str) -> bytes | None:
    """The bytes that a vocabulary's entry stands for; None where it has other characters."""
    try:
        return bytes(_BYTE[character] for character in text)
    except KeyError:
        return None


def byte_level_backend(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], split: str | None, *,
    ignore_merges: bool = False,
) -> tokenizers.Tokenizer:  # fmt: skip
    """BPE over bytes within the words that the pattern cuts out; without one, over the text.

    ignore_merges: a whole word that is in the vocabulary is taken as it is, even where the merges
    do not lead to it: what tiktoken does.
    """
    model = models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=ignore_merges)
    backend = tokenizers.Tokenizer(model)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [pre_tokenizers.Split(tokenizers.Regex(split), "isolated")] if split else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, as_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend
