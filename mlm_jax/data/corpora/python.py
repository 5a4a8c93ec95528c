"""The sources of Python's standard library, about 370 files and 7.6 MB: one document a file.

Their size is stable across Python versions; their bytes are not.
"""

from mlm_jax.data.corpora.sources import (
    Example,
    Package,
    Recipe,
    python_itself,
    read_sources,
    unique,
)


def harvest(packages: list[Package]) -> list[Example]:
    sources = [s for package in packages for s in read_sources(package.folder) if is_code(s.text)]
    return [Example(s.file, s.text) for s in unique(sources, key=lambda s: s.text)]


def is_code(text: str) -> bool:
    """Rather than a table: short lines, and letters in them."""
    readable = sum(c.isalpha() or c.isspace() for c in text) >= 0.6 * len(text)
    return readable and max(map(len, text.split("\n"))) <= 400


RECIPE = Recipe("causal", lambda: [python_itself()], harvest)
