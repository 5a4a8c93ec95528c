"""Regular expressions that cut a text into the words that BPE works on.

All are written so that Oniguruma (in `tokenizers`) and fancy-regex (in tiktoken) match the same:
possessive `++` and `?+`, but `(?>...)` where `{1,3}+` would be a repeated group to Oniguruma; `\\z`
where `$` would be the end of a line. Sources: GPT-2's encoder.py, tiktoken_ext/openai_public.py and
Llama 3's tokenizer.py.
"""

import re

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|(?>\p{N}{1,3})| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++\z|\s*[\r\n]|\s+(?!\S)|\s"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words, numbers and punctuation with a space before them; a newline together with the indent after
# it, which in Python code is one token of its own.
PYTHON = r" ?[A-Za-z_]+| ?[0-9]+| ?[^\sA-Za-z_0-9]+|\n *|\s+(?!\S)|\s+"


def for_oniguruma(pattern: str) -> str:
    """A pattern as tiktoken publishes them, in words that Oniguruma reads in the same way."""
    atom = r"(\\[pP]\{\w+\}|\\.|\[[^\]]*\]|\([^()]*\)|[^\\()\[\]])"
    pattern = re.sub(atom + r"(\{\d+(?:,\d*)?\})\+", r"(?>\1\2)", pattern)
    return re.sub(r"(?<!\\)\$(?=[|)]|$)", r"\\z", pattern)
