"""The ids that a byte-level `tokenizers` backend gives, several times as fast: by tiktoken.

tiktoken merges any two neighbours that together are a token, by the rank of that token alone, where
`tokenizers` has a list of pairs. `exact_bpe` gives an encoder only where both are the same.

1. Merging. Any bytes go through the same steps alone as within a longer word (tiktoken_file.merges
   says why). So if two neighbours together are a token, that token alone goes through these two
   parts. If it comes out whole, the pair is in the list: both merge, at the same rank. If it does
   not, tiktoken must not know it, unless as a whole word (`ignore_merges`), which is harmless where
   it ends in three parts or more, as then no two neighbours ever are this token. That each token
   comes out whole is tried, for all of them, with `tokenizers` itself.
2. Cutting into words. Only patterns known to mean the same to both regex engines (split_patterns),
   and only if both put the same characters into the pattern's classes, which is tried for every
   character there is: versions of Unicode differ.
3. Added tokens. A text that has the name of one is left to `tokenizers`.
"""

import functools
import itertools
import json
import re
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from mlm_jax.data.tokenizer.byte_level import token_of
from mlm_jax.data.tokenizer.split_patterns import CL100K, GPT2, LLAMA3, O200K, PYTHON

try:
    import tiktoken
except ImportError:  # it is optional
    tiktoken: Any = None

EXTRAS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
SPLITS = (GPT2, CL100K, LLAMA3, O200K, PYTHON)
# tiktoken seeks special tokens in a text even if none is allowed; with none at all it stops at each
# character, which is slow. This is one that it does not find.
NONE_SUCH = "\0<none such>"
# Planes 4 to 13 have no characters, 15 and 16 are for private use.
CHARACTERS = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000))))


class ExactBpe:
    """A text to its ids, int32; None for a text that only `tokenizers` can encode."""

    def __init__(self, ids_of_tokens: dict[bytes, int], split: str, added: list[str]):
        """ids_of_tokens: in the order of merging."""
        ranks = {token: rank for rank, token in enumerate(ids_of_tokens)}
        self.ids = np.array([*ids_of_tokens.values()], np.int32)
        self.encoding = tiktoken.Encoding(
            "exact", pat_str=split, mergeable_ranks=ranks, special_tokens={NONE_SUCH: len(ranks)}
        )
        self.added = re.compile("|".join(map(re.escape, added))) if added else None

    def __call__(self, text: str) -> np.ndarray | None:
        if self.added and self.added.search(text):
            return None
        try:
            return self.ids[self.encoding.encode_to_numpy(text, disallowed_special=())]
        except ValueError:  # spaces without end are too much for its regex engine
            return None


def exact_bpe(backend: tokenizers.Tokenizer) -> ExactBpe | None:
    """The faster encoder of this backend; None where it might differ, or tiktoken is missing."""
    if tiktoken is None:
        return None
    state = json.loads(backend.to_str())
    model, split = state["model"], split_of(state["pre_tokenizer"])
    plain = model["type"] == "BPE" and not any(model[extra] for extra in EXTRAS)
    if state["normalizer"] or split not in SPLITS or not plain:
        return None
    tokens = tokens_in_order(model)
    if tokens is None or not all(map(same_characters, classes(split))):
        return None
    return ExactBpe(tokens, split, [token["content"] for token in state["added_tokens"]])


def split_of(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern that cuts words, where bytes are all that is done to them after it."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern},
                 "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:  # fmt: skip
            return pattern
    return None


def tokens_in_order(model: dict[str, Any]) -> dict[bytes, int] | None:
    """The ids of the tokens that tiktoken may know, in the order of merging: 1. in the head."""
    entries = {name: token_of(name) for name in model["vocab"]}
    entries = {name: token for name, token in entries.items() if token is not None}
    merges = [tuple(pair) for pair in model["merges"]]
    bare = tokenizers.Tokenizer(models.BPE(vocab=model["vocab"], merges=merges))
    alone = bare.encode_batch_fast(list(entries), add_special_tokens=False)
    parts = {name: len(encoding.ids) for name, encoding in zip(entries, alone, strict=True)}
    singles = [name for name, token in entries.items() if len(token) == 1]
    # A token may have several pairs, of which one is ever used: any, if they stand together.
    made = [name for name, _ in itertools.groupby(left + right for left, right in merges)]
    if len(singles) < 256 or len(made) > len(set(made)):
        return None
    whole = [name for name in made if parts[name] == 1]
    if model["ignore_merges"]:
        if 2 in parts.values():
            return None
        whole += [name for name in entries if parts[name] > 2]
    return {entries[name]: model["vocab"][name] for name in singles + whole}


def classes(split: str) -> set[str]:
    """The sets of characters that a pattern tells apart, beyond those it names one by one."""
    folded = {"(?i:[a-z])"} if "(?i:" in split else set()
    return {*re.findall(r"\\p\{\w+\}", split), r"\s"} | folded


@functools.cache
def same_characters(kind: str) -> bool:
    """Whether both regex engines find the same characters of a class."""
    bytes_alone = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding(
        kind, pat_str=f"(?:{kind})+", mergeable_ranks=bytes_alone, special_tokens={}
    )
    split = pre_tokenizers.Split(tokenizers.Regex(f"(?:{kind})+"), "removed", invert=True)
    found = "".join(part for part, _ in split.pre_tokenize_str(CHARACTERS))
    return bytes(encoding.encode_ordinary(CHARACTERS)) == found.encode()
