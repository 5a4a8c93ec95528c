"""Rows of a model that reads one text and writes another: spans taken out of texts, and pairs.

tokens int32 [S], segments int32 [S], 1 or 0 for padding, of the encoder, whose text ends with eos
as T5's does; decoder_tokens, targets int32 [T], weights float32 [T], 0 = padding, of the decoder.
"""

import logging
from collections.abc import Sequence

import numpy as np

from mlm_jax.config import ModelConfig
from mlm_jax.data.objectives.examples import Example
from mlm_jax.data.objectives.t5_spans import (
    Marks,
    T5Tokens,
    noise_spans,
    spans_within,
    t5_row,
)
from mlm_jax.data.objectives.windows import Row, padded
from mlm_jax.data.sampling import GptSamples
from mlm_jax.errors import DataError

log = logging.getLogger(__name__)


class SpanRows:
    """Samples of a token file, documents end to end; row i is drawn by (seed, i)."""

    def __init__(self, samples: GptSamples, cfg: ModelConfig, ids: T5Tokens, seed: int):
        self.samples, self.cfg, self.ids, self.seed = samples, cfg, ids, seed

    @staticmethod
    def text_length(cfg: ModelConfig, ids: T5Tokens) -> int:
        """Tokens of a sample: the most of which both sides hold theirs."""
        n, count = spans_within(cfg.seq_len - 1, cfg.target_len)
        if n < 2:
            raise DataError(
                f"model.seq_len={cfg.seq_len} and model.target_len={cfg.target_len} hold no text"
                " with a span taken out; try 8 and 4, or more"
            )
        if count > len(ids.sentinels):
            raise DataError(
                f"model.seq_len={cfg.seq_len} takes {count} spans out of a text, and the tokenizer"
                f" has {len(ids.sentinels)} names for places (<extra_id_0>, ...); make seq_len"
                " smaller"
            )
        return n

    def __len__(self) -> int:
        return len(self.samples)

    def row(self, i: int) -> Row:
        text = self.samples[i]
        if text.min() < 0 or text.max() >= self.cfg.vocab_size:
            raise DataError(
                f"{self.samples.indexed.prefix} holds token id {text.max()}, beyond"
                f" model.vocab_size={self.cfg.vocab_size}"
            )
        spans = noise_spans(len(text), np.random.RandomState([self.seed, i]))
        row = t5_row(
            np.append(text, self.ids.eos), spans, ids=self.ids, encoder_length=self.cfg.seq_len,
            decoder_length=self.cfg.target_len,
        )  # fmt: skip
        return {**row, "segments": row.pop("mask").astype(np.int32)}


class PairRows:
    """A pair a row: what is not trained is read, the rest is written; what is too long is cut."""

    def __init__(self, examples: Sequence[Example], cfg: ModelConfig, marks: Marks):
        self.examples, self.cfg, self.marks = examples, cfg, marks
        written = np.array([e.trained.sum() for e in examples])
        read = np.array([len(e.trained) for e in examples]) - written + 1
        if long := np.count_nonzero((read > cfg.seq_len) | (written > cfg.target_len)):
            log.warning(
                "%d of %d pairs lose an end at model.seq_len=%d, model.target_len=%d",
                long, len(examples), cfg.seq_len, cfg.target_len,
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.examples)

    def row(self, i: int) -> Row:
        (tokens, trained), (start, eos, pad) = self.examples[i], self.marks
        S, T = self.cfg.seq_len, self.cfg.target_len
        read = [*tokens[~trained][: S - 1].tolist(), eos]
        written = [*tokens[trained][:-1].tolist(), eos][:T]  # the last is the end of a document
        return {
            "tokens": padded(read, S, pad),
            "segments": (np.arange(S) < len(read)).astype(np.int32),
            "decoder_tokens": padded([start, *written[:-1]], T, pad),
            "targets": padded(written, T, pad),
            "weights": (np.arange(T) < len(written)).astype(np.float32),
        }
