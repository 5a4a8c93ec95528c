"""English prose: the paragraphs of docstrings, one document a file; each paragraph once."""

import itertools

from mlm_jax.data.corpora.docstrings import docstrings, documented, paragraphs
from mlm_jax.data.corpora.sources import Example, Package, Recipe, folded, unique
from mlm_jax.data.tokenizer.settings import BERT


def harvest(packages: list[Package]) -> list[Example]:
    found = [
        (f"{package.name}/{docstring.file}", text.replace("`", ""))
        for package in packages
        for docstring in docstrings(package)
        for text in paragraphs(docstring.text)
        if len(text.split()) >= 8
    ]
    by_file = itertools.groupby(unique(found, key=lambda x: folded(x[1])), key=lambda x: x[0])
    return [Example(file, "\n\n".join(text for _, text in part) + "\n") for file, part in by_file]


RECIPE = Recipe("causal", documented, harvest)
SENTENCES = Recipe("masked", documented, harvest, special=tuple(BERT.values()))
