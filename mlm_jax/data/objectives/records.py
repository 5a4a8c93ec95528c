"""Conversations, pairs and preferences as files have them: read, checked, brought to one form.

One JSON object a line (.jsonl), or for pairs also two columns with a tab between (.tsv); either may
be .gz or .zst. Blank lines are skipped. What is wrong is named by file and line, up to ten at once.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mlm_jax.data.text_files import (
    decoded,
    decompressed,
    json_object,
    lacks,
    text_of,
    told,
    utf8_size,
)
from mlm_jax.errors import DataError

T = TypeVar("T")
Messages = list[dict[str, Any]]

MOST_PROBLEMS = 10
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {  # its names for them
    "human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant",
}  # fmt: skip


class Conversation(NamedTuple):
    """messages: {role, content, ...}; tools: JSON schemas, or None; where: file and line."""

    where: str
    messages: Messages
    tools: list[Any] | None


class Pair(NamedTuple):
    where: str
    source: str
    target: str


class Choice(NamedTuple):
    """A prompt and two answers: three texts, or three lists of messages."""

    where: str
    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: list[Any] | None


class Problems:
    """Gathers what is wrong with lines, so that a person sees the first ten at once."""

    def __init__(self):
        self.found: list[str] = []

    @contextlib.contextmanager
    def at(self, where: str) -> Iterator[None]:
        """A DataError from within is kept, with `where` before it; the tenth raises all."""
        try:
            yield
        except DataError as why:
            self.found.append(f"{where}: {why}")
            if len(self.found) == MOST_PROBLEMS:
                self.check("\n(what comes after these has not been looked at)")

    def check(self, more: str = "") -> None:
        """Raises one DataError with all that was found."""
        if self.found:
            raise DataError("\n".join(self.found) + more)


def read_conversations(file: Path | str) -> list[Conversation]:
    """From `messages` (OpenAI's form), `conversations` (ShareGPT's) or `instruction` (Alpaca's).

    Raises DataError for lines that are none of these, and where no message is an assistant's.
    """
    return read_objects(file, lambda where, record: conversation(where, record))


def read_pairs(file: Path | str, *, languages: tuple[str, str] | None = None) -> list[Pair]:
    """From {"source", "target"}, from {"translation": {"en": ..., "fr": ...}}, or from a .tsv.

    languages: which of a translation's is the source, and which the target; None: the first two, in
    the order of each line.
    """
    if Path(file).name.endswith((".tsv", ".tsv.gz", ".tsv.zst")):
        return read_lines(file, columns)
    return read_objects(file, lambda where, record: pair(where, record, languages))


def read_preferences(file: Path | str) -> list[Choice]:
    """From {"prompt", "chosen", "rejected"}: texts, or lists of messages.

    Without a prompt, or where it is a text and the answers are lists, the prompt is the messages
    with which both begin.
    """
    return read_objects(file, choice)


def conversation(where: str, record: Mapping[str, Any]) -> Conversation:
    if "messages" in record:
        messages = record["messages"]
    elif "conversations" in record:
        messages = from_sharegpt(record["conversations"])
    elif "instruction" in record:
        given = text_of(record, "input") if record.get("input") else ""
        asked = "\n\n".join(filter(None, (text_of(record, "instruction"), given)))
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": text_of(record, "output")},
        ]
    else:
        raise lacks(record, "'messages', 'conversations' or 'instruction'")
    checked = checked_messages(messages)
    if not any(message["role"] == "assistant" for message in checked):
        raise DataError("no message is an assistant's: there is nothing to learn from it")
    return Conversation(where, checked, tools_of(record))


def from_sharegpt(turns: Any) -> Any:
    """Messages of {"from", "value"}; what has no `from` is left as it is."""
    if not isinstance(turns, list):
        return turns
    return [
        {"role": SHAREGPT.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if isinstance(turn, dict) and isinstance(turn.get("from"), str) else turn
        for turn in turns
    ]  # fmt: skip


def checked_messages(messages: Any) -> Messages:
    """Raises DataError unless each is an object with a known role and something to say."""
    if not isinstance(messages, list) or not messages:
        raise DataError("its messages are no list, or an empty one")
    for i, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise DataError(f"message {i} is a {type(message).__name__}, not an object")
        if message.get("role") not in ROLES:
            known = ", ".join(ROLES)
            raise DataError(f"message {i} has role {message.get('role')!r}; there are {known}")
        content = message.get("content")
        calls = content is None and message["role"] == "assistant" and message.get("tool_calls")
        if not (isinstance(content, str) or calls):
            raise DataError(
                f"message {i} ({message['role']}) has {type(content).__name__} for content; give a"
                " text, or with an assistant's tool_calls null"
            )
        utf8_size(content or "")  # refuses what is no Unicode
    return messages


def pair(where: str, record: Mapping[str, Any], languages: tuple[str, str] | None) -> Pair:
    if "translation" in record:
        record = record["translation"]
        if not isinstance(record, dict) or len(record) < 2:
            raise DataError("'translation' is no object with two languages")
        source, target = languages or list(record)[:2]
    else:
        source, target = "source", "target"
    return Pair(where, text_of(record, source), text_of(record, target))


def columns(where: str, line: bytes) -> Pair | None:
    if not (text := decoded(line)).strip():
        return None
    parts = text.rstrip("\r\n").split("\t")
    if len(parts) != 2:
        raise DataError(f"{len(parts)} columns between tabs instead of 2, source and target")
    return Pair(where, *parts)


def choice(where: str, record: Mapping[str, Any]) -> Choice:
    prompt, *answers = (record.get(key) for key in ("prompt", "chosen", "rejected"))
    if all(isinstance(answer, list) for answer in answers):
        chosen, rejected = map(checked_messages, answers)
        if isinstance(prompt, list):
            prompt = checked_messages(prompt)
        else:
            n = shared_messages(chosen, rejected)
            prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
        if not prompt:
            raise DataError("there is no prompt: 'chosen' and 'rejected' differ from the first on")
        for name, messages in (("chosen", chosen), ("rejected", rejected)):
            if not any(message["role"] == "assistant" for message in messages):
                raise DataError(f"behind the prompt no message of {name!r} is an assistant's")
        return Choice(where, prompt, chosen, rejected, tools_of(record))
    texts = (text_of(record, key) for key in ("prompt", "chosen", "rejected"))
    return Choice(where, *texts, tools=None)


def shared_messages(a: Messages, b: Messages) -> int:
    """With how many both begin."""
    differs = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differs, min(len(a), len(b)))


def tools_of(record: Mapping[str, Any]) -> list[Any] | None:
    tools = record.get("tools")
    if not (tools is None or isinstance(tools, list)):
        raise DataError(f"its 'tools' are a {type(tools).__name__}, not a list")
    return tools or None


def read_objects(file: Path | str, make: Callable[[str, dict[str, Any]], T]) -> list[T]:
    """make(where, fields) of each line that is not blank."""

    def parse(where: str, line: bytes) -> T | None:
        return None if (fields := json_object(line)) is None else make(where, fields)

    return read_lines(file, parse)


def read_lines(file: Path | str, make: Callable[[str, bytes], T | None]) -> list[T]:
    """What make(where, line) gives that is not None. Raises DataError with all problems."""
    problems, made = Problems(), []
    with told(str(file)), open(file, "rb") as raw, decompressed(raw, str(file)) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            with problems.at(where):
                made.append(make(where, line))
    problems.check()
    if not (made := [record for record in made if record is not None]):
        raise DataError(f"{file}: there is nothing in it")
    return made
