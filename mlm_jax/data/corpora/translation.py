"""Sentences in English and in another language, from the message catalogues of web software.

Placeholders such as %(name)s stay, on both sides; what is not the same on both is left out, and so
is a sentence that is its own translation.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from mlm_jax.data.corpora.catalogues import Message, read_catalogue
from mlm_jax.data.corpora.sources import Example, Package, Recipe, folded, installed, walk
from mlm_jax.errors import DataError

TRANSLATED = {"django": "django", "wagtail": "wagtail", "sphinx": "sphinx"}
PLACEHOLDER = re.compile(r"%\(\w+\)[a-z]|%[sdr]|\{[\w.!:]*\}|<[^<>]+>")
# French sets a space before some punctuation that no line may break at.
SPACES = re.compile(r"[\s\u00a0\u202f]+")


def translated(language: str) -> list[Package]:
    """Raises DataError without django, and where it comes without its catalogues."""
    packages = installed(TRANSLATED)
    django = next((p for p in packages if p.name == "django"), None)
    hint = "pip install django, or mlm_jax[translation], which asks for it"
    if django is None:
        raise DataError(f"the built-in pairs en-{language} are django's: it is missing; {hint}")
    if not catalogue_sizes(language, django.folder):
        raise DataError(f"{django.folder}: django without its .po files for {language!r}; {hint}")
    return packages


def catalogue_sizes(language: str, folder: Path) -> dict[str, int]:
    files = (f for f in walk(folder) if f.suffix == ".po" and f.parts[-3] == language)
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def harvest(language: str, packages: list[Package]) -> list[Example]:
    """One example a sentence and translation, the source being what the sentence reads as."""
    found = {}
    for package in packages:
        for file in sorted(catalogue_sizes(language, package.folder)):
            for message in read_catalogue(package.folder / file):
                found |= dict.fromkeys(pairs(message))
    return [Example(folded(s), {"source": s, "target": t}) for s, t in found]


def pairs(message: Message) -> Iterator[tuple[str, str]]:
    """The singular and the plural with the last of its forms, where they are fit to learn from."""
    if message.fuzzy:
        return
    sources = [message.source, *([message.plural] if message.plural else [])]
    targets = [*message.translations[:1], *message.translations[1:][-1:]]
    for source, target in zip(sources, targets, strict=False):
        source, target = normalised(source), normalised(target)
        letters, translated_letters = folded(source), folded(target)
        if len(letters) > 2 and translated_letters not in ("", letters) and agree(source, target):
            yield source, target


def agree(source: str, target: str) -> bool:
    """Whether both have the same placeholders and tags, however often."""
    return set(PLACEHOLDER.findall(source)) == set(PLACEHOLDER.findall(target))


def normalised(text: str) -> str:
    return SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip()


def recipe(language: str) -> Recipe:
    return Recipe(
        objective="pairs",
        packages=functools.partial(translated, language),
        sizes=functools.partial(catalogue_sizes, language),
        harvest=functools.partial(harvest, language),
        held_out=10,  # of few sentences
        special=("<|endoftext|>", "<|en|>", f"<|{language}|>"),
    )


FRENCH, GERMAN = recipe("fr"), recipe("de")
