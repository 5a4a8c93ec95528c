"""English prose: the paragraphs of docstrings, one document a file.

Code, tables, lists of arguments and markup are left out, and so is a paragraph that was seen
before, letter for letter.
"""

from collections.abc import Iterable

from mlm_jax.data.corpora.docstrings import Docstring, docstrings, documented, documented_sizes
from mlm_jax.data.corpora.rest import paragraphs
from mlm_jax.data.corpora.sources import Example, Package, Recipe, without_repeats


def harvest(packages: list[Package]) -> list[Example]:
    seen: set[str] = set()
    examples = []
    for package in packages:
        for file, texts in by_file(docstrings(package)).items():
            if kept := without_repeats(texts, seen):
                examples.append(Example(f"{package.name}/{file}", "\n\n".join(kept) + "\n"))
    return examples


def by_file(found: Iterable[Docstring]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for docstring in found:
        texts.setdefault(docstring.file, []).extend(paragraphs(docstring.text))
    return texts


RECIPE = Recipe("causal", documented, documented_sizes, harvest)
