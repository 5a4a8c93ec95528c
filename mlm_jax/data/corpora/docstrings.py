"""Docstrings of installed packages, and the English in them."""

import ast
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from mlm_jax.data.corpora.sources import Package, installed, python_itself, read_sources

DOCUMENTED = (  # name, licence, folder
    ("numpy", "BSD-3-Clause", "numpy"),
    ("scipy", "BSD-3-Clause", "scipy"),
    ("jax", "Apache-2.0", "jax"),
    ("flax", "Apache-2.0", "flax"),
    ("optax", "Apache-2.0", "optax"),
    ("orbax-checkpoint", "Apache-2.0", "orbax"),
)
MARKUP = (  # of reStructuredText; what is read instead
    (re.compile(r":[\w:]+:`~?([^`<>]+?)\s*(?:<[^`]*>)?`"), r"`\1`"),
    (re.compile(r"``+"), "`"),
    (re.compile(r"(?<!\w)(\*\*?)(\w[^*]*)\1(?!\w)"), r"\2"),
)
# What no running text has: code, formulas, addresses, and markup that was not understood.
SYMBOLS = re.compile(r"[^\w\s.,:;!?'\"()=/%+&-]|::|--|://|\b_|_\b|(?<!\w)=|=(?!\w)|\s[.,:;)]")
SENTENCE = re.compile(r"[A-Z\"'].*[\w)\"'][.!?][\")']*")


Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Docstring(NamedTuple):
    """file: its path below the package's folder; module: its dotted name.

    name   of the object within its module, 'Class.method'; of the module itself ''
    """

    file: str
    module: str
    name: str
    node: Node
    text: str


def documented() -> list[Package]:
    """Python itself, and those of the packages that are installed."""
    return [python_itself(), *(p for names in DOCUMENTED for p in installed(*names))]


def docstrings(package: Package) -> Iterator[Docstring]:
    """By file, in the order they are written; of functions in functions none."""
    top = "" if package.name == "Python" else package.folder.name + "."
    for source in read_sources(package.folder):
        module = top + source.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name, node in objects(source.tree):
            if text := ast.get_docstring(node):
                yield Docstring(source.file, module, name, node, text)


def objects(node: Node, name: str = "") -> Iterator[tuple[str, Node]]:
    yield name, node
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from objects(child, f"{name}.{child.name}".lstrip("."))


def paragraphs(text: str) -> list[str]:
    """Lines that stand equally far to the right, as one, where they read as whole sentences.

    Code is marked by backquotes. Code blocks, tables, titles and lists of names do not read so.
    """
    lines = text.expandtabs().splitlines()
    blocks = (list(block) for _, block in itertools.groupby(lines, key=indent))
    return [line for block in blocks if is_prose(line := marked(" ".join(block)))]


def indent(line: str) -> int:
    return len(line) - len(line.lstrip()) if line.strip() else -1


def marked(text: str) -> str:
    text = " ".join(text.split())
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return text


def is_prose(text: str) -> bool:
    """At least three words, nearly all of them letters, from a capital to a full stop."""
    bare = text.replace("`", "")
    if SYMBOLS.search(bare) or not SENTENCE.fullmatch(bare):
        return False
    whole = bare.count("(") == bare.count(")") and bare.count('"') % 2 == text.count("`") % 2 == 0
    letters = sum(c.isalpha() or c == " " for c in bare)
    return whole and len(bare.split()) >= 3 and letters > 0.87 * len(bare)
