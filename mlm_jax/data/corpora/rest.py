"""The English in a docstring: its paragraphs, without markup, code, tables and lists of arguments.

Reads reStructuredText, with the sections of NumPy's and of Google's style, and Markdown's fences.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

# Sections of which nothing is running text.
SECTIONS = {
    "parameters", "other parameters", "keyword arguments", "keyword args", "args", "arguments",
    "returns", "return", "yields", "receives", "raises", "warns", "attributes", "methods",
    "see also", "examples", "example", "example usage", "usage", "references", "reference",
    "doctests", "call arguments", "input shape", "output shape", "todo", "history", "authors",
    "author", "copyright", "keywords", "options", "fields",
}  # fmt: skip
UNDERLINE = re.compile(r"\s*([-=~^\"'*+#])\1{2,}\s*")
TITLE = re.compile(r"\s*([A-Za-z][A-Za-z ]+):{1,2}\s*")
ADMONITION = re.compile(
    r"\s*(?:\.\.\s*(?:note|warning|important|tip|hint|caution|attention)::|(?:Notes?|Warning):$)(.*)"
)
ITEM = re.compile(r"(?:[-*+•]|\(?[0-9]{1,2}[.)]|\(?[a-z]\))\s+(?=\S)")
CODE = re.compile(r"\s*(?:>>>|\.\.(?:\.?\s|$)|In \[\d+\]:|\$ |:[\w -]+:|@\w)")  # or a directive

MARKUP = (  # what is read instead; {} is the mark around code
    (re.compile(r":[a-zA-Z:+-]+:`~(?:[^`<>]*\.)?([^`<>.]+)`"), r"{}\1{}"),
    (re.compile(r":[a-zA-Z:+-]+:`!?([^`<>]+?)\s*(?:<[^`]*>)?`"), r"{}\1{}"),
    (re.compile(r"``(.+?)``"), r"{}\1{}"),
    (re.compile(r"(?<![`\w])`([^`<>]+?)\s*<[^`]*>`__?"), r"\1"),
    (re.compile(r"(?<![`\w])`([^`]+)`__?(?!\w)"), r"\1"),
    (re.compile(r"(?<![`\w])`([^`]+)`(?![`\w])"), r"{}\1{}"),
    (re.compile(r"(?<![\w*`])(\*\*?)(?=\S)([^*`]+?)(?<=\S)\1(?![\w*`])"), r"\2"),
    (re.compile(r"\s*\[[\w-]+\]_(?!\w)"), ""),
)
# What no running text has: markup that was not understood, code, formulas, addresses.
LEFT_OVER = re.compile(
    r"[\\{}|<>^~@#$*`]|\b_|_\b|(?<!\w)=|=(?!\w)|::|https?:|www\.|(?:^|\s)[.,;:)]|[.,;]\.|--|\[\d"
)
SENTENCE_END = re.compile(r"[\w)\]\"'][.!?][\")']*$")


def paragraphs(docstring: str) -> list[str]:
    """Those that read as whole sentences, in order, each on one line."""
    return [text for text in map(plain, blocks(docstring)) if is_prose(text)]


def is_prose(text: str, words: int = 8) -> bool:
    """At least so many words, nearly all of them letters, from a capital to a full stop."""
    if len(text.split()) < words or not (text[0].isupper() or text[0] in "\"'"):
        return False
    if LEFT_OVER.search(text) or not SENTENCE_END.search(text):
        return False
    whole = text.count("(") == text.count(")") and text.count('"') % 2 == 0
    return whole and sum(c.isalpha() or c == " " for c in text) > 0.87 * len(text)


def plain(text: str, code: str = "") -> str:
    """One line without the markup of reStructuredText; `code` goes around what it marks as code."""
    text = " ".join(text.split())
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement.replace("{}", code), text)
    return text.strip()


def blocks(docstring: str) -> Iterator[str]:
    """The paragraphs and items of lists that stand at the margin, in order, with their markup."""
    lines = unwrapped(without_sections(list(without_fences(docstring.expandtabs().splitlines()))))
    for blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
        block = list(group)
        if blank or block[0].startswith(" ") or any(map(CODE.match, block)):
            continue
        if ITEM.match(block[0]):
            yield from items(block)
        elif not any(line.startswith(" ") for line in block):  # that is a list of definitions
            yield "\n".join(block)


def items(lines: Sequence[str]) -> Iterator[str]:
    starts = [i for i, line in enumerate(lines) if ITEM.match(line)]
    for start, end in itertools.pairwise([*starts, len(lines)]):
        yield ITEM.sub("", "\n".join(lines[start:end]), count=1)


def without_fences(lines: Iterable[str]) -> Iterator[str]:
    inside = False
    for line in lines:
        if fence := line.lstrip().startswith(("```", "~~~")):
            inside = not inside
        yield "" if inside or fence else line


def without_sections(lines: Sequence[str]) -> Iterator[str]:
    """NumPy's are a title with a line under it; Google's a title with a colon, and an indent."""
    dropped, margin = False, None
    for line, below in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        if line.strip() and UNDERLINE.fullmatch(below):
            dropped, margin = line.strip().lower() in SECTIONS, None
            yield ""
            continue
        if margin is not None and line.strip() and indent(line) <= margin:
            margin = None
        title = TITLE.fullmatch(line)
        if margin is None and title and title[1].lower() in SECTIONS:
            margin = indent(line)
        left_out = dropped or margin is not None or UNDERLINE.fullmatch(line)
        yield "" if left_out else line


def unwrapped(lines: Iterable[str]) -> Iterator[str]:
    """The text of notes and warnings, which is indented, moves to where these begin."""
    margin = body = None
    for line in lines:
        if margin is not None and line.strip():
            if indent(line) <= margin:
                margin = None
            else:
                body = indent(line) if body is None else body
                line = " " * margin + line[min(body, indent(line)) :]
        if note := ADMONITION.match(line):
            margin, body = indent(line), None
            yield ""
            line = " " * margin + note[1].strip()
        yield line


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())
