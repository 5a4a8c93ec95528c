"""From settings to batches: batch k is a function of seed, global batch size and data alone."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mlm_jax.config import RunConfig
from mlm_jax.data.builtin import Corpus, builtin_corpus
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.sampling import GptSamples, split_ranges
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mlm_jax.errors import DataError
from mlm_jax.layout import Layout

HostBatch = dict[str, np.ndarray]
BUILTIN_VOCAB = 2048
SMALLEST_VOCAB = 257  # 256 bytes, and the end of a document
CHECKED_TOKENS = 50_000_000  # of each file at start; every batch is checked when it is read


class Data(NamedTuple):
    """What a run reads. valid is None where the split has no part for it."""

    train: "Batches"
    valid: "Batches | None"
    tokenizer: Tokenizer | None
    corpus: Corpus | None  # the built-in one, where data.path is not set

    def fingerprint(self) -> dict[str, Any]:
        """What a run that goes on must find again, wherever its files are by then."""
        return self.train.indexed.fingerprint()


def open_data(run: RunConfig) -> Data:
    """Opens and checks the files of a run. Raises DataError naming what does not fit."""
    if run.data.path is None:
        if run.model.vocab_size < SMALLEST_VOCAB:
            raise DataError(
                f"model.vocab_size={run.model.vocab_size} is too small for the built-in corpus;"
                f" try {SMALLEST_VOCAB} or more, or set data.path"
            )
        corpus = builtin_corpus(min(BUILTIN_VOCAB, run.model.vocab_size))
        tokenizer = load_tokenizer(corpus.tokenizer)
        train, valid = (IndexedDataset(prefix) for prefix in (corpus.train, corpus.valid))
        parts = (train, range(len(train))), (valid, range(len(valid)))
    else:
        corpus = None
        tokenizer = None
        if run.data.tokenizer:
            with naming(f"data.tokenizer={run.data.tokenizer!r}"):
                tokenizer = load_tokenizer(run.data.tokenizer)
        with naming(f"data.path={run.data.path!r}", prefixes_near(run.data.path)):
            indexed = IndexedDataset(run.data.path)
        if indexed.n_tokens == 0:
            raise DataError(
                f"data.path={run.data.path!r} holds no tokens; build it again from text"
            )
        with naming("data.split"):
            train, valid, _ = split_ranges(run.data.split, len(indexed))
        shares = [float(part) for part in run.data.split.replace(",", " ").split()]
        if not valid and any(shares[1:2]):
            raise DataError(
                f"data.split={run.data.split!r} leaves none of {len(indexed)} documents for"
                " validation; give it a larger part, or 0"
            )
        parts = (indexed, train), (indexed, valid)
    if not run.data.cross_document_attention and max(p[0].lengths.max() for p in parts) < 2:
        raise DataError("every document has one token: none is predicted from another")
    if tokenizer and tokenizer.vocab_size > run.model.vocab_size:
        raise DataError(
            f"model.vocab_size={run.model.vocab_size} is smaller than the tokenizer's"
            f" {tokenizer.vocab_size}; try model.vocab_size={tokenizer.vocab_size}"
        )
    for indexed in {id(indexed): indexed for indexed, _ in parts}.values():
        check_ids(indexed, run.model.vocab_size)
    (indexed, train), (held_out, valid) = parts
    batches = Batches(run, indexed, train)
    return Data(batches, Batches(run, held_out, valid) if valid else None, tokenizer, corpus)


@contextlib.contextmanager
def naming(setting: str, hint: str = "") -> Iterator[None]:
    """A DataError from within names the setting behind it."""
    try:
        yield
    except DataError as why:
        raise DataError(f"{setting}: {why}{hint}") from None


def prefixes_near(path: str) -> str:
    """'; try a or b': prefixes that a path to a file or a folder may stand for."""
    stem = path.removesuffix(".bin").removesuffix(".idx")
    found = [Path(f"{stem}.idx"), *sorted(Path(path).glob("*.idx"))]
    there = [str(idx)[: -len(".idx")] for idx in found if idx.exists()]
    there = [prefix for prefix in there if prefix != path]
    return f"; try {' or '.join(there[:3])}" if there else ""


class Batches:
    """Batch k of a split: samples k * B to (k + 1) * B of an endless stream of epochs.

    Each epoch is Megatron's index for one epoch: within the first, samples come as in Megatron-LM.
    There later ones are shuffled with it, so that their order depends on the steps asked for.
    """

    def __init__(self, run: RunConfig, indexed: IndexedDataset, sequences: range):
        self.indexed, self.sequences, self.run = indexed, sequences, run
        self._epoch = functools.lru_cache(maxsize=2)(self._index_epoch)
        self.n_samples = len(self._epoch(0))  # also refuses a split without a whole sample

    def batch(self, k: int, *, once: bool = False) -> HostBatch:
        """tokens, targets, segments, positions int32 [B, T]; weights float32 [B, T], 0 = untrained.

        segments and positions, which keep packed documents apart, are left out where
        data.cross_document_attention is set. once: what comes after the first epoch has weight 0.
        """
        B = self.run.train.global_batch_size
        rows = [self._row(i) for i in range(k * B, (k + 1) * B)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if once:
            batch["weights"] *= np.arange(k * B, (k + 1) * B)[:, None] < self.n_samples
        return batch

    def prefetch(self, start: int, stop: int) -> Iterator[HostBatch]:
        """Batches start to stop, read ahead by a thread."""
        import grain

        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        yield from grain.MapDataset.range(start, stop).map(self.batch).to_iter_dataset(ahead)

    def _row(self, i: int) -> HostBatch:
        pieces = self._epoch(i // self.n_samples).pieces(i % self.n_samples)
        tokens = np.concatenate(pieces, dtype=np.int32)
        vocab_size = self.run.model.vocab_size
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise DataError(bad_ids(self.indexed.prefix, tokens, vocab_size))
        row = {"tokens": tokens[:-1], "targets": tokens[1:]}
        if self.run.data.cross_document_attention:
            return row | {"weights": np.ones(len(tokens) - 1, np.float32)}
        lengths = np.array([len(piece) for piece in pieces])
        segments = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
        begins = np.repeat(np.cumsum(lengths) - lengths, lengths)
        positions = (np.arange(len(tokens)) - begins).astype(np.int32)
        # The first token of a document has nothing in its own document to be predicted from.
        weights = (segments[1:] == segments[:-1]).astype(np.float32)
        return row | {"segments": segments[:-1], "positions": positions[:-1], "weights": weights}

    def _index_epoch(self, epoch: int) -> GptSamples:
        seed = self.run.train.seed  # Megatron's order; later epochs draw seeds of their own
        if epoch:
            seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        return GptSamples(
            self.indexed, self.sequences, n_samples=None, seq_len=self.run.model.seq_len,
            seed=seed,
        )  # fmt: skip


def place(batch: HostBatch, layout: Layout) -> dict[str, jax.Array]:
    """The batch on the devices of a layout, rows split over its data axes."""
    return jax.device_put(batch, layout.sharding("batch", None))


def check_ids(indexed: IndexedDataset, vocab_size: int) -> None:
    """Raises DataError where the file, or an even sample of a very large one, has other ids."""
    stride = max(1, indexed.n_tokens // CHECKED_TOKENS)
    for i in range(0, len(indexed), stride):
        tokens = indexed.tokens(i)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise DataError(bad_ids(indexed.prefix, tokens, vocab_size))


def bad_ids(prefix: Path | str, tokens: np.ndarray, vocab_size: int) -> str:
    wrong = int(next(t for t in tokens.tolist() if not 0 <= t < vocab_size))
    return (
        f"{prefix}.bin holds token id {wrong}, beyond model.vocab_size={vocab_size};"
        " set model.vocab_size to the size of the tokenizer that built it"
    )
