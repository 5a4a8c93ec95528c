"""Conversations as text, by the Jinja template of a tokenizer; and which of it an assistant says.

Templates are those of Hugging Face's tokenizer_config.json, with the same surroundings (tojson,
raise_exception, strftime_now, `generation` tags, names of special tokens), in Jinja's sandbox: a
template may come from anywhere.
"""

import datetime
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser, sandbox

from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import DataError

log = logging.getLogger(__name__)

Message = Mapping[str, Any]  # role, content, and what else the template knows: tool_calls, name ...
Span = tuple[int, int]  # characters: begin, end

CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\nTools, one JSON object a line:' }}
{%- for tool in tools %}
{{- '\\n' + (tool | tojson) }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>' + (call | tojson) + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# Templates may write today's date. In training it must not depend on the day a run goes on: this is
# the one that Llama's template takes where it knows none.
TRAINING_DAY = datetime.datetime(2024, 7, 26)
# Around what an assistant says, where a template tells: random, so that no conversation has them.
BEGIN, END = (f"\ufdd0{secrets.token_hex(8)}{side}" for side in "<>")


class ChatTemplate:
    """A compiled template. Raises DataError where it is no valid Jinja.

    special: names of special tokens by what the template calls them: {"bos_token": "<s>"}.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None):
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template cannot be read: {error}") from None
        self.special = dict(special or {})

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate":
        """The tokenizer's, or ChatML where it has none."""
        special = {
            f"{role}_token": tokenizer.decode([id]) for role, id in tokenizer.special.items()
        }
        source = tokenizer.config.get("chat_template")
        if source is None:
            source, lacking = CHATML, [t for t in CHATML_TOKENS if tokenizer.id_of(t) is None]
            if lacking:
                log.warning(
                    "the tokenizer has no chat template; ChatML is taken, of which it lacks the"
                    " special tokens %s: they are written as ordinary text", " and ".join(lacking),
                )  # fmt: skip
        if not isinstance(source, str):
            raise DataError(
                "chat_template of the tokenizer is no text; of several, write one into"
                " chat_template.jinja beside it"
            )
        return cls(source, special)

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:  # fmt: skip
        """The text of a conversation; with add_generation_prompt up to where an assistant begins.

        Raises DataError where the template refuses.
        """
        text = self._marked(messages, tools, add_generation_prompt, datetime.datetime.now())
        return text.replace(BEGIN, "").replace(END, "")

    def spans(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, first: int = 0
    ) -> tuple[str, list[Span]]:
        """The text, and the characters an assistant says in it, from message `first` on.

        That is what the model has to write: from the end of the prompt it is given at inference up
        to what ends the turn, inclusive. Where the template marks it by `generation` tags, these
        are taken at their word. Otherwise it is what message i adds to the text of the messages
        before it, with their prompt.

        Raises DataError where the text of the first messages is not how the text of all begins.
        """
        marked = self._marked(messages, tools, False, TRAINING_DAY)
        if BEGIN in marked:
            text, spans = unmarked(marked)
            before = self._marked(messages[:first], tools, True, TRAINING_DAY) if first else ""
            return text, [span for span in spans if span[0] >= len(unmarked(before)[0])]
        spans = []
        for i, message in enumerate(messages):
            if i < first or message["role"] != "assistant":
                continue
            prompt = self._marked(messages[:i], tools, True, TRAINING_DAY)
            whole = self._marked(messages[: i + 1], tools, False, TRAINING_DAY)
            if not (marked.startswith(whole) and whole.startswith(prompt)):
                raise DataError(
                    f"the chat template writes messages 1 to {i + 1} otherwise when more follow, or"
                    " when their answer is still to come, so that it cannot be told what the"
                    " assistant says; mark it by {% generation %} ... {% endgeneration %} in the"
                    " template, or take another"
                )
            spans.append((len(prompt), max(len(prompt), end_of_turn(whole, message))))
        return marked, spans

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool,
        now: datetime.datetime,
    ) -> str:  # fmt: skip
        given = {
            **self.special, "messages": messages, "tools": tools, "documents": None,
            "add_generation_prompt": prompt, "strftime_now": now.strftime,
        }  # fmt: skip
        try:
            return self._template.render(given)
        except Exception as error:  # it is a program that anyone may have written
            raise DataError(f"the chat template refuses: {error}") from None


class Generation(ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what is between is put between marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


def unmarked(marked: str) -> tuple[str, list[Span]]:
    """The text without marks, and what was between them."""
    text, *parts = marked.split(BEGIN)
    spans = []
    for part in parts:
        inside, _, outside = part.partition(END)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans


def end_of_turn(text: str, message: Message) -> int:
    """Where a text that ends with this turn has its last token: not a line break behind it."""
    closed, content = text.rstrip(), (message.get("content") or "").rstrip()
    nothing_closes_it = content and closed.endswith(content)
    return len(text) if nothing_closes_it else len(closed)


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own would escape what HTML takes for tags."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
