"""GNU gettext's message catalogues, .po files, as text.

The format: https://www.gnu.org/software/gettext/manual/html_node/PO-Files.html
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mlm_jax.errors import DataError

LINE = re.compile(r'(?:(msgctxt|msgid|msgid_plural|msgstr(?:\[\d+\])?)\s+)?"((?:[^"\\]|\\.)*)"')
ESCAPED = {"n": "\n", "t": "\t", "r": "\r"}  # any other escaped character is itself


class Message(NamedTuple):
    """translations: of the singular, then the plural forms of the language; '' where missing."""

    source: str
    plural: str | None
    translations: tuple[str, ...]
    context: str | None
    fuzzy: bool


def read_catalogue(file: Path) -> list[Message]:
    """All but the header and the obsolete messages. Raises DataError naming file and line."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as a catalogue: {error}") from None
    found = [message(fields, fuzzy) for fields, fuzzy in entries(text.splitlines(), file)]
    return [m for m in found if m.source]  # the empty source is the header's


def message(fields: dict[str, str], fuzzy: bool) -> Message:
    forms = [text for key, text in fields.items() if key.startswith("msgstr")]
    source, plural = fields.get("msgid", ""), fields.get("msgid_plural")
    return Message(source, plural, tuple(forms), fields.get("msgctxt"), fuzzy)


def entries(lines: list[str], file: Path) -> Iterator[tuple[dict[str, str], bool]]:
    """The fields of each message by keyword, and whether it is marked fuzzy."""
    fields: dict[str, str] = {}
    fuzzy, keyword = False, ""
    for number, line in enumerate([*map(str.strip, lines), "#"], start=1):
        begins = line.startswith(("#", "msgctxt", "msgid ")) or not line
        if begins and any(key.startswith("msgstr") for key in fields):
            yield fields, fuzzy
            fields, fuzzy = {}, False
        if line.startswith("#,"):
            fuzzy |= "fuzzy" in line
        elif line and not line.startswith("#"):  # '#~' is obsolete, '#|' was the source before
            parts = LINE.fullmatch(line)
            if not parts or not (parts[1] or keyword):
                raise DataError(f"{file}, line {number}: {line!r} is no line of a .po file")
            keyword = parts[1] or keyword
            fields[keyword] = fields.get(keyword, "") + unescaped(parts[2])


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: ESCAPED.get(match[1], match[1]), text)
