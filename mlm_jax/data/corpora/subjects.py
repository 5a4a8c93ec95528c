"""What is known of a documented function or class: its summary, its arguments, an example."""

import ast
import doctest
import re
from collections.abc import Iterator
from typing import NamedTuple

from mlm_jax.data.corpora.docstrings import Definition, Docstring
from mlm_jax.data.corpora.rest import DEFINITIONS, LEFT_OUT, blocks, is_prose, plain
from mlm_jax.data.corpora.sources import Package

Arguments = tuple[tuple[str, str | None], ...]  # (name, default or None where there is none)
LONGEST = 300  # characters of an answer
REFERS = re.compile(r"\b(see|above|below|following|deprecated|internal|FIXME)\b", re.IGNORECASE)
VERBS = {  # that summaries begin with
    "accept", "add", "append", "apply", "assert", "assign", "attach", "break", "broadcast", "build",
    "calculate", "call", "change", "check", "clear", "clone", "close", "collect", "combine",
    "compare", "compile", "compute", "concatenate", "configure", "construct", "convert",
    "copy", "count", "create", "decode", "decorate", "define", "delete", "describe",
    "determine", "display", "draw", "dump", "emit", "emulate", "encapsulate", "encode",
    "ensure", "estimate", "evaluate", "execute", "expand", "extract", "fetch", "fill",
    "finalize", "find", "fit", "flatten", "flush", "force", "format", "generate", "get",
    "give", "handle", "implement", "infer", "initialize", "insert", "install", "instantiate",
    "integrate", "interpolate", "invert", "invoke", "iterate", "join", "list", "load", "log",
    "look", "lower", "make", "manage", "map", "mark", "match", "merge", "move", "multiply",
    "normalize", "open", "parse", "perform", "plot", "pop", "print", "process", "produce",
    "provide", "put", "raise", "read", "receive", "reduce", "register", "release", "remove",
    "rename", "replace", "report", "represent", "request", "reset", "resolve", "restore",
    "retrieve", "return", "round", "run", "sample", "save", "search", "select", "send",
    "serialize", "set", "shift", "show", "shut", "simulate", "skip", "solve", "sort",
    "specify", "split", "start", "stop", "store", "subtract", "suggest", "take", "test",
    "transform", "translate", "transpose", "try", "turn", "unpack", "update", "use",
    "validate", "verify", "wait", "walk", "wrap", "write", "yield",
}  # fmt: skip
AND_VERB = re.compile(rf"(and|or|then) ({'|'.join(sorted(VERBS))})\b")


class Subject(NamedTuple):
    """name: within its module; home: the module, or the package where the module is private.

    summary    a sentence or two on what it is
    more       what comes after that, or ''
    arguments  None where they are not known
    example    lines of an interactive session that ends in a result, or ''
    """

    name: str
    home: str
    is_class: bool
    is_public: bool
    summary: str
    more: str
    arguments: Arguments | None
    example: str

    @property
    def full(self) -> str:
        """As a question names it."""
        return f"`{self.home}.{self.name}`" if self.is_public else f"{self.home}'s `{self.name}`"


def subject(package: Package, docstring: Docstring) -> Subject | None:
    """None where its docstring does not begin with a summary that can stand alone."""
    if not docstring.names or isinstance(docstring.node, ast.Module):
        return None
    texts = [sentence(b) for b in blocks(docstring.text, LEFT_OUT | DEFINITIONS)][:2]
    if not texts or not texts[0]:
        return None
    is_public = not any(part.startswith("_") for part in docstring.module.split("."))
    if not package.prefix and not is_public:
        return None  # Python's private modules lend their objects to others, under other names
    return Subject(
        name=".".join(docstring.names),
        home=docstring.module if is_public else package.prefix.rstrip("."),
        is_class=isinstance(docstring.node, ast.ClassDef),
        is_public=is_public,
        summary=texts[0],
        more="".join(texts[1:]),
        arguments=arguments(docstring.node, is_method=len(docstring.names) > 1),
        example=example(docstring.text, docstring.names[-1]),
    )


def sentence(block: str) -> str:
    """A paragraph that can stand alone, code in backquotes, with a full stop; or ''."""
    bare, marked = plain(block), plain(block, code="`")
    if "\n" not in block and bare[-1:].isalnum():  # summaries often have none
        bare, marked = bare + ".", marked + "."
    fits = is_prose(bare, words=3) and len(marked) <= LONGEST and not REFERS.search(bare)
    return marked if fits else ""


def third_person(summary: str) -> str:
    """'It returns the sum.' of 'Return the sum.', and of 'Returns the sum.'; else as it is."""
    first, _, rest = summary.partition(" ")
    verb = first.lower()
    if verb in VERBS and not AND_VERB.search(rest):
        return f"It {inflected(verb)} {rest}"
    return f"It {verb} {rest}" if verb in map(inflected, VERBS) else summary


def inflected(verb: str) -> str:
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "z")) else "s")


def arguments(node: Definition, is_method: bool) -> Arguments | None:
    """Those of a call: without self, of a class those of its __init__."""
    if isinstance(node, ast.ClassDef):
        found = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return arguments(found[0], is_method=True) if found else None
    decorators = " ".join(map(ast.unparse, node.decorator_list))
    if "property" in decorators:
        return None
    given = tuple(signature(node.args))
    if is_method and "staticmethod" not in decorators:
        given = given[1:]
    if any(name == "self" for name, _ in given):  # what a decorator makes of it takes others
        return None
    return given if len(called("", given)) <= 100 else None


def signature(args: ast.arguments) -> Iterator[tuple[str, str | None]]:
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + [*args.defaults]
    for arg, default in zip(positional, defaults, strict=True):
        yield arg.arg, ast.unparse(default) if default else None
    if args.vararg:
        yield f"*{args.vararg.arg}", None
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield arg.arg, ast.unparse(default) if default else None
    if args.kwarg:
        yield f"**{args.kwarg.arg}", None


def called(name: str, arguments: Arguments) -> str:
    """dedent(text, width=70)"""
    given = (name if default is None else f"{name}={default}" for name, default in arguments)
    return f"{name}({', '.join(given)})"


def example(text: str, name: str) -> str:
    """The first statements of a doctest, up to the one that calls this and has a short result."""
    try:
        found = doctest.DocTestParser().get_examples(text)[:4]
    except ValueError:
        return ""
    for number, last in enumerate(found, start=1):
        if f"{name}(" in last.source and last.want.strip():
            lines = "".join(session(e.source, e.want) for e in found[:number]).rstrip()
            odd = any(word in lines for word in ("Traceback", "doctest:", "BLANKLINE", "\n...\n"))
            return "" if odd or len(lines) > LONGEST else lines
    return ""


def session(source: str, want: str) -> str:
    first, *more = source.splitlines(keepends=True)
    return ">>> " + first + "".join("... " + line for line in more) + want
