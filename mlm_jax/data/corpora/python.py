"""The sources of Python's standard library, about 370 files and 7.6 MB: one document a file.

Their size is stable across Python versions; their bytes are not.
"""

import ast
import contextlib
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

from mlm_jax.data.corpora.sources import Example, Package, Recipe, python_itself, source_sizes


def harvest(packages: list[Package]) -> list[Example]:
    return [
        Example(name, text)
        for package in packages
        for name, text in read_sources(package.folder, sorted(source_sizes(package.folder))).items()
    ]


def read_sources(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The candidates that read like code, without repetitions, by their names."""
    texts = {}
    for name in names:
        with contextlib.suppress(UnicodeDecodeError):
            text = (folder / name).read_text(encoding="utf-8").replace("\t", "    ")
            if is_code(text):
                texts.setdefault(hashlib.sha1(text.encode()).digest(), (name, text))
    return dict(texts.values())


def is_code(text: str) -> bool:
    readable = sum(c.isalpha() or c.isspace() for c in text) >= 0.6 * len(text)
    if not readable or max(map(len, text.split("\n"))) > 400:  # a table, not code
        return False
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True


RECIPE = Recipe("causal", lambda: [python_itself()], source_sizes, harvest)
