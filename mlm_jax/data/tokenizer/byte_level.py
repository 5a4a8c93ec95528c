"""Byte-level vocabularies: each byte is written as one printable character, as in GPT-2."""

from collections.abc import Mapping, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

# Printable bytes stand for themselves, the other 68 for the characters from U+0100 on, in order.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTER = {byte: 0x100 + n for n, byte in enumerate(_OTHERS)}
# Back again; characters that stand for no byte become one that Latin-1 does not have.
_BYTE = {character: byte for byte, character in _CHARACTER.items()} | dict.fromkeys(_OTHERS, 0xFFFF)


def characters(token: bytes) -> str:
    """How a vocabulary writes this token: one character a byte."""
    return token.decode("latin-1").translate(_CHARACTER)


def token_of(text: str) -> bytes | None:
    """The bytes that a vocabulary's entry stands for; None where it has other characters."""
    if any(ord(c) >= 0x100 + len(_OTHERS) for c in text):
        return None
    try:
        return text.translate(_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        return None


def byte_level_backend(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    split: str | None,
    *,
    ignore_merges: bool = False,
) -> tokenizers.Tokenizer:
    """BPE over bytes within the words that the pattern cuts out; without one, over the text.

    ignore_merges: a whole word that is in the vocabulary is taken as it is, even where the merges
    do not lead to it: what tiktoken does.
    """
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=ignore_merges)
    )
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend
