"""Where installed text lies, in which version and under which licence; nothing is imported."""

import dataclasses
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

# Tests, tables and third parties: little like what a person writes.
SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "distutils", "tkinter", "turtledemo"}
SKIPPED |= {"encodings", "pydoc_data", "ensurepip", "msilib", "site-packages", "dist-packages"}
SKIPPED |= {"__pycache__"}


class Package(NamedTuple):
    """folder: of the import package; prefix: its dotted name and a dot, of Python's own ''."""

    name: str
    version: str
    licence: str
    folder: Path
    prefix: str


class Example(NamedTuple):
    """One document and what it comes from: examples with one source are held out together.

    content: a text, or the object of a JSON line, {"messages": [{"role", "content"}, ...]} or
    {"source", "target"}.
    """

    source: str
    content: Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a corpus is made.

    packages   what it is made from; raises DataError where what it cannot do without is missing
    sizes      bytes of each file it reads of a package, by its path below the folder
    harvest    the examples, in an order that depends on the files alone
    held_out   one source in so many
    special    tokens of its tokenizer, with the ids 0, 1, ...
    last       tokens with the last ids
    settings   of its tokenizer_config.json
    """

    objective: str
    packages: Callable[[], list[Package]]
    sizes: Callable[[Path], dict[str, int]]
    harvest: Callable[[list[Package]], list[Example]]
    held_out: int = 20
    special: tuple[str, ...] = ("<|endoftext|>",)
    last: tuple[str, ...] = ()
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)


def python_itself() -> Package:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return Package("Python", platform.python_version(), "PSF-2.0", stdlib, "")


def installed(names: Mapping[str, str]) -> list[Package]:
    """Those of these distributions that are installed. names: import package by distribution."""
    found = []
    for name, package in names.items():
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        folder = Path(str(distribution.locate_file(package)))
        if folder.is_dir():
            licence = licence_of(distribution.metadata)
            found.append(Package(name, distribution.version, licence, folder, f"{package}."))
    return found


def licence_of(fields: metadata.PackageMetadata) -> str:
    """As a package names it: an SPDX expression, a line, or what its classifier says."""
    for key in ("License-Expression", "License"):
        line = (fields.get_all(key) or [""])[0].strip()
        if line and "\n" not in line:
            return line
    classifiers = fields.get_all("Classifier") or []
    named = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License :: ")]
    return ", ".join(named) or "licence not named"


def source_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each Python file that may be worth reading, by its path below folder."""
    sizes = {}
    for file in walk(folder):
        if file.suffix != ".py" or file.name.startswith("_sysconfigdata") or not file.is_file():
            continue  # a dead link is no file
        if 200 <= (size := file.stat().st_size) <= 200_000:
            sizes[file.relative_to(folder).as_posix()] = size
    return sizes


def walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f not in SKIPPED and not f.startswith("config-")]
        yield from (Path(parent, name) for name in names)


def is_held_out(source: str, one_in: int = 20) -> bool:
    """One source in twenty, by its name, so that it stays where it is in every version."""
    return hashed(source) % one_in == 0


def hashed(text: str) -> int:
    return int(hashlib.sha1(text.encode()).hexdigest(), 16)


def folded(text: str) -> str:
    """The letters of a text alone, in lower case: what two texts that are nearly one have alike."""
    return "".join(c for c in text.casefold() if c.isalpha())


def without_repeats(texts: Iterable[str], seen: set[str]) -> list[str]:
    """Those that do not read as one in `seen` does, which gets what they read as."""
    kept = []
    for text in texts:
        if (letters := folded(text)) not in seen:
            seen.add(letters)
            kept.append(text)
    return kept
