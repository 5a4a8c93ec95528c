"""The English in a docstring: its paragraphs, without markup, code, tables and lists of arguments.

Reads reStructuredText, with the sections of NumPy's and of Google's style, and Markdown's fences.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

# Sections of names, each with its description.
DEFINITIONS = {
    "parameters", "other parameters", "keyword arguments", "keyword args", "args", "arguments",
    "call arguments", "returns", "return", "yields", "receives", "attributes", "options", "fields",
}  # fmt: skip
# Sections without running text.
LEFT_OUT = {
    "methods", "see also", "examples", "example", "example usage", "usage", "references",
    "reference", "doctests", "input shape", "output shape", "todo", "history", "authors", "author",
    "copyright", "keywords", "raises", "warns",
}  # fmt: skip
UNDERLINE = re.compile(r"\s*([-=~^\"'*+#])\1{2,}\s*")
TITLE = re.compile(r"\s*([A-Za-z][A-Za-z ]+):{1,2}\s*")
ADMONITION = re.compile(
    r"\s*(?:\.\.\s*(?:note|warning|important|tip|hint|caution|attention)::|(?:Notes?|Warning):$)(.*)"
)
DEFINED = re.compile(r"[\w.,*`\\ -]+?(?: ?\([^()]*\))?:\s+(.+)")  # a name, a type, a description
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
# What no running text has: markup that was not understood, code, formulas, addresses, and gaps
# where a citation was.
LEFT_OVER = re.compile(
    r"[\\{}|<>^~@#$*`]|\b_|_\b|(?<!\w)=|=(?!\w)|::|https?:|www\.|(?:^|\s)[.,;:)]|[.,;]\.|--|\[\d"
    r"|\b(?:of|from|by|see|the|and|in)[.,;]"
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


def blocks(docstring: str, left_out: Collection[str] = LEFT_OUT) -> Iterator[str]:
    """The paragraphs and items of lists that stand at the margin, in order, with their markup.

    left_out: sections; of DEFINITIONS the descriptions count as paragraphs.
    """
    lines = list(without_fences(docstring.expandtabs().splitlines()))
    lines = without_google_sections(without_numpy_sections(lines, left_out), left_out)
    for blank, group in itertools.groupby(unwrapped(lines), key=lambda line: not line.strip()):
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


def without_numpy_sections(lines: Sequence[str], left_out: Collection[str]) -> Iterator[str]:
    """A title with a line under it; descriptions are four spaces to the right of their names."""
    section = ""
    for line, below in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        if line.strip() and UNDERLINE.fullmatch(below):
            section = line.strip().lower()
            yield ""
        elif section in left_out or UNDERLINE.fullmatch(line):
            yield ""
        elif section in DEFINITIONS:
            yield line[4:] if indent(line) >= 4 else ""
        else:
            yield line


def without_google_sections(lines: Iterable[str], left_out: Collection[str]) -> Iterator[str]:
    """A title with a colon; `name (type): description` below it, two or four spaces to the right,
    goes on still further to the right.
    """
    section, margin, body = "", 0, None
    for line in lines:
        if line.strip() and indent(line) <= margin:
            section = ""
        title = TITLE.fullmatch(line)
        if not section and title and title[1].lower() in {*left_out, *DEFINITIONS}:
            section, margin, body = title[1].lower(), indent(line), None
            yield ""
        elif section in left_out or not line.strip():
            yield ""
        elif section:
            body = indent(line) if body is None else body
            if indent(line) == body:  # another name
                yield ""
            defined = DEFINED.fullmatch(line.strip()) if indent(line) == body else None
            text = defined[1][0].upper() + defined[1][1:] if defined else line.strip()
            yield " " * margin + text
        else:
            yield line


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
