"""Docstrings and signatures of installed packages, read from their sources."""

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mlm_jax.data.corpora.sources import Package, installed, python_itself, source_sizes

DOCUMENTED = {  # import packages by the names that pip knows
    "numpy": "numpy", "scipy": "scipy", "jax": "jax", "flax": "flax", "optax": "optax",
    "orbax-checkpoint": "orbax",
}  # fmt: skip

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which UTF-8 does not have
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Docstring(NamedTuple):
    """file: its path below the package; names: of the object within its module, outermost first.

    module     its dotted name
    node       of the object; of a module, which has no names, the whole tree
    public     whether no name begins with an underscore and __all__, where there is one, has it;
               a module may be private and its objects public all the same
    """

    file: str
    module: str
    names: tuple[str, ...]
    node: ast.Module | Definition
    text: str
    public: bool


def documented() -> list[Package]:
    """Python itself, and those of the packages that are installed."""
    return [python_itself(), *installed(DOCUMENTED)]


def documented_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each source that is no test, by its path."""
    sizes = source_sizes(folder)
    return {f: n for f, n in sizes.items() if not re.search(r"(^|/)test_|_tests?\.py$", f)}


def docstrings(package: Package) -> Iterator[Docstring]:
    """All of a package, by file, in the order they are written; functions in functions have none.

    Files that are not UTF-8 or not Python are passed over.
    """
    for file in sorted(documented_sizes(package.folder)):
        try:
            text = (package.folder / file).read_text(encoding="utf-8")
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        dotted = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        exported = exports(tree)
        for names, node in objects(tree, ()):
            if (text := ast.get_docstring(node)) and not SURROGATE.search(text):
                hidden = exported is not None and names and names[0] not in exported
                public = not hidden and not any(name.startswith("_") for name in names)
                module = package.prefix + dotted
                yield Docstring(file, module, names, node, text, public)


def objects(
    node: ast.Module | Definition, names: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], ast.Module | Definition]]:
    yield names, node
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, Definition):
                yield from objects(child, (*names, child.name))


def exports(tree: ast.Module) -> set[str] | None:
    """The strings of __all__, or None where the module has none that can be read."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and "__all__" in map(ast.unparse, node.targets):
            strings = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            return {s for s in strings if isinstance(s, str)} or None
    return None
