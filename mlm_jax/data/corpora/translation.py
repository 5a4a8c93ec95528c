"""Sentences in English and in another language: the message catalogues of django, .po files.

https://www.gnu.org/software/gettext/manual/html_node/PO-Files.html has their format. Placeholders
such as %(name)s stay, on both sides.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from mlm_jax.data.corpora.sources import Example, Package, Recipe, folded, installed
from mlm_jax.errors import DataError

FIELD = re.compile(r'^(msg\S+) ((?:".*"\s*)+)', re.MULTILINE)


def translated(language: str) -> list[Package]:
    """Raises DataError without django, and where it comes without its catalogues."""
    packages = list(installed("django", "BSD-3-Clause", "django"))
    if not any(catalogues(language, package) for package in packages):
        where = packages[0].folder if packages else "not installed"
        hint = "pip install django, or mlm_jax[translation], which asks for it"
        raise DataError(
            f"the built-in pairs en-{language} are in django's .po files: {where}; {hint}"
        )
    return packages


def catalogues(language: str, package: Package) -> list[Path]:
    return sorted(package.folder.glob(f"**/locale/{language}/LC_MESSAGES/*.po"))


def harvest(language: str, packages: list[Package]) -> list[Example]:
    """One example a sentence and translation, the source being what the sentence reads as."""
    files = [file for package in packages for file in catalogues(language, package)]
    pairs = dict.fromkeys(pair for file in files for pair in read_catalogue(file))
    return [Example(folded(s), {"source": s, "target": t}) for s, t in pairs if fit(s, t)]


def read_catalogue(file: Path) -> Iterator[tuple[str, str]]:
    """Each message and its translation; a plural with the last of its forms.

    Without those marked fuzzy, and the obsolete, which are comments.
    """
    for entry in file.read_text(encoding="utf-8").split("\n\n"):
        # Strings are written as in Python, where neighbours are one, too.
        fields = {k: ast.literal_eval(f"({text})") for k, text in FIELD.findall(entry)}
        sources = [fields[key] for key in ("msgid", "msgid_plural") if key in fields]
        targets = [text for key, text in fields.items() if key.startswith("msgstr")]
        if targets and not re.search("^#,.*fuzzy", entry, re.MULTILINE):
            for source, target in zip(sources, (targets[0], targets[-1]), strict=False):
                yield " ".join(source.split()), " ".join(target.split())


def fit(source: str, target: str) -> bool:
    """Whether there are words, and a translation of them."""
    return len(folded(source)) > 2 and folded(target) not in ("", folded(source))


def recipe(language: str) -> Recipe:
    return Recipe(
        objective="pairs",
        packages=functools.partial(translated, language),
        harvest=functools.partial(harvest, language),
        held_out=10,  # of few sentences
        special=("<|endoftext|>", "<|en|>", f"<|{language}|>"),
    )


FRENCH, GERMAN = recipe("fr"), recipe("de")
