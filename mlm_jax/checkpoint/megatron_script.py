"""The words of a shell script that starts Megatron-LM. Nothing is executed.

Assignments, arrays, quotes, comments, continued lines and `${X:-default}` are followed. What only a
shell can know (arguments of the script, `$(...)`, arithmetic) stays in a word behind UNKNOWN, so
that whoever needs the word can say why it is missing.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

UNKNOWN = "\0"  # before a piece of a word that only a shell could replace
PATTERNS = {
    "substitution": re.compile(r"\$\(|`"),
    "braces": re.compile(
        r"\$\{(?P<name>\w+|[@*#?])(\[[@*]\])?(?P<rest>[^{}]*(\{[^{}]*\}[^{}]*)*)\}"
    ),
    "plain": re.compile(r"\$(?P<name>[A-Za-z_]\w*|[\d@*#?$!])"),
}  # fmt: skip
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
SPLIT = r"[^ \t\n]+"  # as unquoted variables are
DECLARE = {"export", "declare", "local", "readonly", "typeset"}
BRANCHES = {"if", "elif", "else", "for", "while", "until", "case", "function"}


class Command(NamedTuple):
    line: int
    words: list[str]


class Script:
    """Commands of a script in order, and the lines whose condition or loop was not followed."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self.variables: dict[str, list[str]] = {}  # a plain one is a list of one
        self.commands: list[Command] = []
        self.branches: list[str] = []
        self._read()

    def _read(self) -> None:
        words, line = [], 1
        for kind, word, line in self._words():
            if kind == "end":
                self._finish(line, words)
                words = []
            elif kind == "array":
                name, plus, items = word
                self.variables[name] = [*(self.variables.get(name, []) if plus else []), *items]
            elif self._assigns(words) and (found := ASSIGNMENT.fullmatch(word)):
                name, plus, value = found.groups()
                before = " ".join(self.variables.get(name, [])) if plus else ""
                self.variables[name] = [before + value]
            else:
                words.append(word)
        self._finish(line, words)

    def _finish(self, line: int, words: list[str]) -> None:
        if words and words[0] in BRANCHES:
            self.branches.append(f"line {line}: {' '.join(words[:6]).replace(UNKNOWN, '')}")
        elif words and words[0] not in DECLARE:
            self.commands.append(Command(line, words))

    @staticmethod
    def _assigns(words: list[str]) -> bool:
        return not words or words[0] in DECLARE or words == ["then"] or words == ["do"]

    def _words(self) -> Iterator[tuple]:
        """("word", text, line), ("array", (name, plus, items), line) and ("end", "", line)."""
        text, word, line = self.text, None, 1
        items, target, skip = [], None, False  # of an array; of what follows > or <
        while self.at < len(text):
            c = text[self.at]
            line = 1 + text.count("\n", 0, self.at) if c == "\n" or word is None else line
            if c in " \t\r\n;&|()<>":
                if target is None and c == "(" and word and re.fullmatch(r"[A-Za-z_]\w*\+?=", word):
                    target, word, items = word, None, []
                    self.at += 1
                    continue
                if word is not None:
                    if target is not None:
                        items.append(word)
                    elif not skip and not (c in "<>" and word.isdigit()):  # 2>&1
                        yield "word", word, line
                    word, skip = None, False
                self.at += 1
                if c in "<>":
                    self.at = re.compile(r"[<>&]*[ \t]*").match(text, self.at).end()  # pyright: ignore[reportOptionalMemberAccess]
                    skip = True
                elif c == ")" and target is not None:
                    yield "array", (target.rstrip("+="), "+" in target, items), line
                    target = None
                elif c in "\n;&|()" and target is None:
                    yield "end", "", line
            elif c == "#" and word is None:
                end = text.find("\n", self.at)
                self.at = len(text) if end < 0 else end
            else:
                splits = target is not None or not ASSIGNMENT.match(word or "")
                pieces = self._pieces(splits)
                if pieces:
                    word = (word or "") + pieces[0]
                for more in pieces[1:]:
                    if target is not None:
                        items.append(word)
                    else:
                        yield "word", word, line
                    word = more
        if word is not None and not skip:
            yield "word", word, line

    def _pieces(self, splits: bool) -> list[str]:
        """What stands here, as pieces of which all but the first begin a word of their own."""
        text, c = self.text, self.text[self.at]
        if c == "\\":
            self.at += 2
            after = text[self.at - 1 : self.at]
            return [] if after in ("\n", "") else [after]
        if c == "'":
            end = text.find("'", self.at + 1)
            end = len(text) if end < 0 else end
            inside, self.at = text[self.at + 1 : end], end + 1
            return [inside]
        if c == '"':
            self.at += 1
            return self._quoted()
        if c in "$`":
            pieces = self._expansion()
            return (
                [word for piece in pieces for word in re.findall(SPLIT, piece)]
                if splits
                else pieces
            )
        self.at += 1
        return [c]

    def _quoted(self) -> list[str]:
        pieces, dropped = [""], False
        while self.at < len(self.text) and (c := self.text[self.at]) != '"':
            if c in "$`":
                found = self._expansion()
                dropped |= not found  # "$@" of nothing is no word, "" is one
                pieces[-1] += "".join(found[:1])
                pieces += found[1:]
                continue
            if c == "\\" and self.text[self.at + 1 : self.at + 2] in tuple('"\\$`\n'):
                self.at += 1
                c = "" if self.text[self.at] == "\n" else self.text[self.at]
            pieces[-1] += c
            self.at += 1
        self.at += 1
        return [] if dropped and pieces == [""] else pieces

    def _expansion(self) -> list[str]:
        text, start = self.text, self.at
        if PATTERNS["substitution"].match(text, start):
            self.at = _end_of_substitution(text, start)
            return [UNKNOWN + text[start : self.at].replace(" ", "\u00a0")]  # stays one word
        found = PATTERNS["braces"].match(text, start) or PATTERNS["plain"].match(text, start)
        if not found:
            self.at += 1
            return [text[start]]
        self.at = found.end()
        name, rest = found["name"], found.groupdict().get("rest") or ""
        if name in "@*":  # the script's own arguments: there are none
            return []
        known = self.variables.get(name)
        default = re.fullmatch(r":?[-=](.*)", rest, re.DOTALL)
        if default and (known is None or known == [""]):
            return [" ".join(word for command in Script._of(default[1], self) for word in command)]
        if known is None or (rest and not default):
            return [UNKNOWN + found[0]]
        return known if "[" in found[0] else known[:1]

    @staticmethod
    def _of(text: str, outer: "Script") -> Iterator[list[str]]:
        """The words of a default, `${X:-$Y}`, with the variables so far."""
        inner = Script("")
        inner.text, inner.at, inner.variables = text, 0, outer.variables
        yield [word for kind, word, _ in inner._words() if kind == "word"]


def _end_of_substitution(text: str, start: int) -> int:
    if text[start] == "`":
        end = text.find("`", start + 1)
        return len(text) if end < 0 else end + 1
    depth = 0
    for at in range(start + 1, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    return len(text)
