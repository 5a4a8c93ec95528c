"""From records to tokens: what a model is given, and what of it it has to learn to write."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm_jax.data.objectives.chat import ChatTemplate
from mlm_jax.data.objectives.records import (
    Choice,
    Messages,
    Problems,
    read_conversations,
    read_pairs,
    read_preferences,
)
from mlm_jax.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from mlm_jax.errors import DataError

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
    """Parts of a text, each with whether it is trained; closed: an EOD is the end, trained too."""

    parts: list[tuple[str, bool]]
    closed: bool


def chat_examples(file: Path | str, tokenizer: Tokenizer) -> list[Example]:
    """Conversations (records.read_conversations), trained where the assistant speaks.

    What ends its turn is trained too. Raises DataError naming lines where the file is not as it
    should be, or the tokenizer's chat template does not fit a conversation.
    """
    template, problems, texts = ChatTemplate.of(tokenizer), Problems(), []
    for where, messages, tools in read_conversations(file):
        with problems.at(where):
            texts.append(conversation_text(template, messages, tools))
    problems.check()
    return encode(texts, tokenizer)


def pair_examples(
    file: Path | str, tokenizer: Tokenizer, prompt: str = "{source}\n"
) -> list[Example]:
    """Pairs (records.read_pairs): the prompt around the source, then target and EOD, trained."""
    texts = [
        pair_text(prompt.replace("{source}", pair.source), pair.target) for pair in read_pairs(file)
    ]
    return encode(texts, tokenizer)


def preference_examples(file: Path | str, tokenizer: Tokenizer) -> list[Preference]:
    """Preferences (records.read_preferences), of which only the answers are trained."""
    template, problems, texts = ChatTemplate.of(tokenizer), Problems(), []
    for choice in read_preferences(file):
        with problems.at(choice.where):
            answers = choice.chosen, choice.rejected
            texts += [answer_text(choice, answer, template) for answer in answers]
    problems.check()
    examples = encode(texts, tokenizer)
    return [Preference(*two) for two in zip(examples[::2], examples[1::2], strict=True)]


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


def pair_text(prompt: str, target: str) -> Text:
    return Text([(prompt, False), (target, True)], closed=True)


def answer_text(choice: Choice, answer: str | Messages, template: ChatTemplate) -> Text:
    if isinstance(choice.prompt, str):
        return pair_text(f"{choice.prompt}\n", str(answer))
    messages = [*choice.prompt, *answer]
    return conversation_text(template, messages, choice.tools, first=len(choice.prompt))


def encode(texts: Sequence[Text], tokenizer: Tokenizer) -> list[Example]:
    """The tokens of each text; no token belongs to two parts, so that prompts are as at inference.

    Where the tokens of a part and the next, encoded together, begin with those of the part alone,
    the rest of them is taken for the next: the pieces of SentencePiece differ at the beginning of a
    text. Otherwise a token would reach over the edge, and each part is encoded by itself.
    """
    if tokenizer.eod_id is None and any(text.closed for text in texts):
        known = ", ".join(END_OF_DOCUMENT)
        raise DataError(f"targets end with an EOD, the tokenizer has none of {known}")
    chunks = (texts[begin : begin + CHUNK] for begin in range(0, len(texts), CHUNK))
    return [example for chunk in chunks for example in _encode_chunk(chunk, tokenizer)]


def _encode_chunk(texts: Sequence[Text], tokenizer: Tokenizer) -> list[Example]:
    neighbours = [(a, b) for text in texts for (a, _), (b, _) in pairwise(text.parts)]
    alone = iter(tokenizer.encode_many([part for text in texts for part, _ in text.parts]))
    joined = iter(tokenizer.encode_many([a + b for a, b in neighbours]))
    examples = []
    for text in texts:
        ids = [next(alone) for _ in text.parts]
        pieces, trained = ids[:1], [is_trained for _, is_trained in text.parts]
        for before, after in pairwise(ids):
            both, n = next(joined), len(before)
            pieces.append(both[n:] if np.array_equal(both[:n], before) else after)
        if text.closed:
            pieces.append(np.array([tokenizer.eod_id]))
            trained.append(True)
        tokens = np.concatenate(pieces, dtype=np.int32)
        examples.append(Example(tokens, np.repeat(trained, [len(piece) for piece in pieces])))
    return examples
