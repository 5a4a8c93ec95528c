"""Completions of Python by a small model, and how many of them Python accepts."""

import ast
import warnings
from typing import Any

from mlm_jax.inference.engine import generate

PROMPTS = (
    "def read(self, size=-1):\n",
    "class Queue:\n    def __init__(self",
    "import os\n\ndef find_files(path",
    "    def close(self):\n",
)


def complete(model: Any, *, best_of: int = 4, max_tokens: int = 64, seed: int = 0) -> list[dict]:
    """For each prompt the best of some completions: the longest that parses, else the first.

    Rows: prompt, text, parses, and accepted: how many of the best_of parse once they are cut after
    their last whole statement. One of which nothing is left is not accepted.
    """
    asked = [prompt for prompt in PROMPTS for _ in range(best_of)]
    texts = generate(
        model, asked, max_tokens=max_tokens, temperature=0.5, repetition_penalty=1.1, seed=seed
    )
    rows = []
    for i, prompt in enumerate(PROMPTS):
        tries = texts[i * best_of : (i + 1) * best_of]
        accepted = [cut for text in tries if (cut := whole_statements(prompt, text))]
        best = max(accepted, key=len, default=tries[0])
        rows.append({
            "prompt": prompt, "text": best, "parses": bool(accepted), "accepted": len(accepted),
            "best_of": best_of,
        })  # fmt: skip
    return rows


def whole_statements(prompt: str, text: str) -> str:
    """The longest head of text, in whole lines, that parses after the prompt; "" if none does."""
    lines = text.splitlines(keepends=True)
    for n in range(len(lines), 0, -1):
        head = "".join(lines[:n])
        if head.strip() and parses(prompt + head):
            return head
    return ""


def parses(code: str) -> bool:
    """Whether it is Python, alone or as the body of a class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in a model's strings
        for candidate in (code, "class _:\n" + code):
            try:
                ast.parse(candidate)
                return True
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
    return False
