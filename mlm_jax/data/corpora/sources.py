"""What corpora are made of: sources of installed packages; nothing is imported or run."""

import ast
import dataclasses
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
# Tests, tables and third parties: little like what a person writes.
SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "distutils", "tkinter", "turtledemo"}
SKIPPED |= {"encodings", "pydoc_data", "ensurepip", "msilib", "__pycache__"}


class Package(NamedTuple):
    """folder: of the import package; of Python, of its standard library."""

    name: str
    version: str
    licence: str
    folder: Path


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
    harvest    the examples, in an order that depends on the files alone
    held_out   one source in so many
    special    tokens of its tokenizer, with the ids 0, 1, ...
    last       tokens with the last ids
    settings   of its tokenizer_config.json
    """

    objective: str
    packages: Callable[[], list[Package]]
    harvest: Callable[[list[Package]], list[Example]]
    held_out: int = 20
    special: tuple[str, ...] = ("<|endoftext|>",)
    last: tuple[str, ...] = ()
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)


def python_itself() -> Package:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return Package("Python", platform.python_version(), "PSF-2.0", stdlib)


def installed(name: str, licence: str, folder: str) -> Iterator[Package]:
    """The distribution of this name, if it is installed. folder: of what one imports."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return
    yield Package(name, found.version, licence, Path(str(found.locate_file(folder))))


class Source(NamedTuple):
    """file: its path below the folder of its package; tabs are four spaces in the text."""

    file: str
    text: str
    tree: ast.Module


def read_sources(folder: Path) -> Iterator[Source]:
    """The Python files that may be worth reading, by name. What is no Python is passed over."""
    for file in sorted(source_files(folder)):
        try:
            text = (folder / file).read_text(encoding="utf-8").replace("\t", "    ")
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        yield Source(file, text, tree)


def source_files(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        # A name with a hyphen is no module's: site-packages, config-3.11-x86_64-linux-gnu.
        folders[:] = [f for f in folders if f not in SKIPPED and "-" not in f]
        for file in (Path(parent, name) for name in names if name.endswith(".py")):
            if file.stem.startswith(("test_", "_sysconfigdata")) or file.stem.endswith("_test"):
                continue
            if file.is_file() and 200 <= file.stat().st_size <= 200_000:  # a dead link is no file
                yield file.relative_to(folder).as_posix()


def is_held_out(source: str, one_in: int = 20) -> bool:
    """One source in twenty, by its name, so that it stays where it is in every version."""
    return int(hashlib.sha1(source.encode()).hexdigest(), 16) % one_in == 0


def folded(text: str) -> str:
    """The letters of a text alone, in lower case: what two texts that are nearly one have alike."""
    return "".join(c for c in text.casefold() if c.isalpha())


def unique(items: Iterable[T], key: Callable[[T], str]) -> list[T]:
    """The first of those with the same key."""
    first: dict[str, T] = {}
    for item in items:
        first.setdefault(key(item), item)
    return list(first.values())
