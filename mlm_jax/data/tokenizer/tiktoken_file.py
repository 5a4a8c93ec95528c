"""tiktoken's files: a line for each token, its bytes in base64 and its rank."""

import base64
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from mlm_jax.data.tokenizer.byte_level import byte_level_backend, characters
from mlm_jax.data.tokenizer.split_patterns import CL100K, GPT2, LLAMA3, O200K, for_oniguruma
from mlm_jax.data.tokenizer.vocabulary_files import extend, marked
from mlm_jax.errors import DataError


class Published(NamedTuple):
    """What a file does not say: how words are cut, and which special tokens there are."""

    name: str
    split: str
    special: dict[str, int]


def read_tiktoken(file: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The same ids as tiktoken's Encoding gives, special tokens found by their names.

    The split pattern is `pat_str` in tokenizer_config.json, the special tokens its
    added_tokens_decoder; what it does not say is that of the published vocabulary with as many
    ranks: GPT-2, cl100k_base, o200k_base or Llama 3. Raises DataError.
    """
    ranks = read_ranks(file)
    published = PUBLISHED.get(len(ranks), Published("", "", {}))
    split = for_oniguruma(config.get("pat_str", published.split))
    if not split:
        known = ", ".join(f"{p.name} ({n})" for n, p in PUBLISHED.items())
        raise DataError(
            f"it has {len(ranks)} ranks, so that how it cuts words is not known; put pat_str (and"
            f" added_tokens_decoder) into tokenizer_config.json beside it. Known: {known}"
        )
    vocab = {characters(token): rank for token, rank in ranks.items()}
    if not config.get("added_tokens_decoder"):
        vocab |= published.special
    added = extend(vocab, config, published.special)
    return marked(byte_level_backend(vocab, merges(ranks), split, ignore_merges=True), added)


def read_ranks(file: Path) -> dict[bytes, int]:
    """Each token's rank, which is its id and the order of merging. Raises DataError."""
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        here = f"line {number}: {line[:60]!r}"
        try:
            word, digits = line.split()
            token, rank = base64.b64decode(word, validate=True), int(digits)
        except ValueError:
            raise DataError(f"{here} is no token in base64 with its rank, as 'IQ== 0'") from None
        if token in ranks or rank in seen:
            raise DataError(f"{here} repeats a token or a rank; each must be there once")
        ranks[token] = rank
        seen.add(rank)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"it lacks the bytes {missing[:8]}; without all 256 a text is lost")
    return ranks


def merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """The pairs of tokens that BPE merges, in order: the same merging as by ranks alone.

    By ranks, any two neighbours merge that together are a token. Take a token alone as a word: its
    merging goes through fixed steps, and within any longer word the same bytes go through the same
    steps, until a merge goes across their ends. So the two parts before its last step are the only
    ones that it is ever made from; and a token that alone does not come out whole is never made,
    but only found as a whole word (`ignore_merges`).
    """
    pairs = (last_pair(token, ranks) for token in sorted(ranks, key=ranks.__getitem__))
    return [(characters(pair[0]), characters(pair[1])) for pair in pairs if pair]


def last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that merging by ranks makes this token from; None where it never does."""
    parts = [token[n : n + 1] for n in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, NEVER) for left, right in itertools.pairwise(parts)]
        first = min(joined)
        if first == NEVER:
            return None
        at = joined.index(first)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


NEVER = 1 << 62
_RESERVED = "<|reserved_special_token_{}|>"
_LLAMA3 = [
    "<|begin_of_text|>", "<|end_of_text|>", *map(_RESERVED.format, range(4)),
    "<|start_header_id|>", "<|end_header_id|>", _RESERVED.format(4), "<|eot_id|>",
    *map(_RESERVED.format, range(5, 251)),
]  # fmt: skip
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
PUBLISHED = {  # by the number of ranks
    50256: Published("GPT-2", GPT2, {"<|endoftext|>": 50256}),
    100256: Published(
        "cl100k_base",
        CL100K,
        {name: 100257 + n for n, name in enumerate(("<|endoftext|>", *_FIM))}
        | {"<|endofprompt|>": 100276},
    ),
    128000: Published("Llama 3", LLAMA3, {name: 128000 + n for n, name in enumerate(_LLAMA3)}),
    199998: Published("o200k_base", O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}
