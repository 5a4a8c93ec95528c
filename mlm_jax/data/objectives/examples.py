"""From records to tokens: what a model is given, and what of it it has to learn to write."""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm_jax.data.objectives.chat import ChatTemplate
from mlm_jax.data.objectives.records import (
    Choice,
    Conversation,
    Messages,
    Problems,
    read_conversations,
    read_pairs,
    read_preferences,
)
from mlm_jax.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from mlm_jax.errors import DataError

PROMPT = "{source}\n"  # what stands before the target of a pair
CHUNK = 1000  # texts that are encoded at once, on all cores


class Example(NamedTuple):
    """tokens int32 [n]; trained bool [n]: those that the model has to predict."""

    tokens: np.ndarray
    trained: np.ndarray


class Preference(NamedTuple):
    """Two examples with the same prompt, of which the first is the better."""

    chosen: Example
    rejected: Example


class Text(NamedTuple):
    """Parts of a text, each with whether it is trained; closed: it ends with an EOD, trained too.

    Never empty.
    """

    parts: list[tuple[str, bool]]
    closed: bool


def chat_examples(file: Path | str, tokenizer: Tokenizer) -> list[Example]:
    """Conversations (records.read_conversations), trained where the assistant speaks.

    What ends its turn is trained too. Raises DataError naming lines where the file is not as it
    should be, or the tokenizer's chat template does not fit a conversation.
    """
    return conversation_examples(read_conversations(file), tokenizer)


def conversation_examples(
    conversations: Sequence[Conversation], tokenizer: Tokenizer
) -> list[Example]:
    template, problems, texts = templates(tokenizer), Problems(), []
    for where, messages, tools in conversations:
        with problems.at(where):
            texts.append(conversation_text(template(bool(tools)), messages, tools))
    problems.check()
    return encode(texts, tokenizer)


def pair_examples(
    file: Path | str, tokenizer: Tokenizer, *, prompt: str = PROMPT,
    languages: tuple[str, str] | None = None,
) -> list[Example]:  # fmt: skip
    """Pairs (records.read_pairs): the source in a prompt, then the target and an EOD to be learned.

    prompt: a text with {source} where that goes.
    """
    if "{source}" not in prompt:
        raise DataError(f"prompt={prompt!r} has no place for the source; try {PROMPT!r}")
    pairs = read_pairs(file, languages=languages)
    return encode([pair_text(prompt, pair.source, pair.target) for pair in pairs], tokenizer)


def preference_examples(
    file: Path | str, tokenizer: Tokenizer, *, prompt: str = PROMPT
) -> list[Preference]:
    """Preferences (records.read_preferences), of which only the answers are trained."""
    template, problems, texts = templates(tokenizer), Problems(), []
    for choice in read_preferences(file):
        with problems.at(choice.where):
            texts += [
                answer_text(choice, answer, template, prompt)
                for answer in (choice.chosen, choice.rejected)
            ]
    problems.check()
    examples = encode(texts, tokenizer)
    return [Preference(*two) for two in zip(examples[::2], examples[1::2], strict=True)]


def templates(tokenizer: Tokenizer) -> Callable[[bool], ChatTemplate]:
    """The tokenizer's template, for conversations with tools or without; compiled once."""
    return functools.cache(lambda tools: ChatTemplate.of(tokenizer, tools=tools))


def conversation_text(
    template: ChatTemplate, messages: Messages, tools: list | None = None, first: int = 0
) -> Text:
    """What an assistant says from message `first` on is trained."""
    text, spans = template.spans(messages, tools=tools, first=first)
    cuts = [0, *(cut for span in spans for cut in span), len(text)]
    pieces = [(text[begin:end], i % 2 == 1) for i, (begin, end) in enumerate(pairwise(cuts))]
    parts = [(piece, trained) for piece, trained in pieces if piece]
    if not any(trained for _, trained in parts):
        raise DataError("in the text of the chat template an assistant says nothing")
    return Text(parts, closed=False)


def pair_text(prompt: str, source: str, target: str) -> Text:
    parts = [(prompt.replace("{source}", source), False), (target, True)]
    return Text([(part, trained) for part, trained in parts if part], closed=True)


def answer_text(
    choice: Choice, answer: str | Messages, template: Callable[[bool], ChatTemplate], prompt: str
) -> Text:
    if isinstance(choice.prompt, str):
        return pair_text(prompt, choice.prompt, str(answer))
    messages, first = [*choice.prompt, *answer], len(choice.prompt)
    return conversation_text(template(bool(choice.tools)), messages, choice.tools, first)


def encode(texts: Sequence[Text], tokenizer: Tokenizer) -> list[Example]:
    """The tokens of each text; no token belongs to two parts, so that prompts are as at inference.

    Where the tokens of a part and the next, encoded together, begin with those of the part alone,
    the rest of them is taken for the next: the pieces of SentencePiece differ at the beginning of a
    text. Otherwise a token would reach over the edge, and each part is encoded by itself.
    """
    eod = tokenizer.eod_id
    if eod is None and any(text.closed for text in texts):
        known = ", ".join(END_OF_DOCUMENT)
        raise DataError(f"targets end with an EOD, the tokenizer has none of {known}")
    return [
        example
        for begin in range(0, len(texts), CHUNK)
        for example in _encode_chunk(texts[begin : begin + CHUNK], tokenizer, eod)
    ]


def _encode_chunk(texts: Sequence[Text], tokenizer: Tokenizer, eod: int | None) -> list[Example]:
    def encoded(pieces: list[str]) -> Iterator[np.ndarray]:
        return (np.asarray(ids, np.int32) for ids in tokenizer.encode_many(pieces))

    alone = encoded([part for text in texts for part, _ in text.parts])
    joined = encoded([a + b for text in texts for (a, _), (b, _) in pairwise(text.parts)])
    examples = []
    for text in texts:
        pieces, before = [], None
        for _ in text.parts:
            piece = ids = next(alone)
            if before is not None:
                both, n = next(joined), len(before)
                piece = both[n:] if np.array_equal(both[:n], before) else ids
            pieces.append(piece)
            before = ids
        trained = [is_trained for _, is_trained in text.parts]
        if text.closed and eod is not None:
            pieces.append(np.array([eod], np.int32))
            trained.append(True)
        lengths = [len(piece) for piece in pieces]
        examples.append(Example(np.concatenate(pieces), np.repeat(trained, lengths)))
    return examples
