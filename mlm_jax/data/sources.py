"""What a split is read from: parts of token files, or of files of conversations and pairs."""

import functools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlm_jax.config import RunConfig
from mlm_jax.data import files
from mlm_jax.data.index_cache import cached
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.objectives.bert_masking import SPECIAL_TOKENS, bert_tokens
from mlm_jax.data.objectives.bert_samples import BertRows, sample_index
from mlm_jax.data.objectives.examples import Example, chat_examples, pair_examples
from mlm_jax.data.objectives.fim import Fim, fill_in_the_middle, fim_tokens
from mlm_jax.data.objectives.packing import PackedExamples
from mlm_jax.data.objectives.t5_spans import marks_of, t5_tokens
from mlm_jax.data.objectives.windows import Row, causal
from mlm_jax.data.sampling import GptSamples
from mlm_jax.data.seq2seq import PairRows, SpanRows
from mlm_jax.data.stream import Rows
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import DataError

CHECKED_TOKENS = 2_000_000  # of each file at start, documents evenly apart


class Source(Protocol):
    """name: its path. size: how many documents, of which a split takes a range."""

    name: str
    size: int

    def epoch(self, part: range, seed: int, n_samples: int | None = None) -> Rows:
        """All samples of the documents in `part`, once, in the order of a seed.

        n_samples: at least so many, by as many epochs as they take, shuffled together.
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What tells these tokens from others, wherever the file is."""
        ...

    def check(self) -> None:
        """Raises DataError where it holds ids that the model does not have."""
        ...


def open_source(
    path: str, run: RunConfig, tokenizer: Tokenizer | None, cache: Path | None
) -> Source:
    """The file, or pair of files, at a path, as the run's objective reads it."""
    examples, endings = run.data.objective in ("chat", "pairs"), (".jsonl", ".tsv", ".gz")
    if examples != path.endswith(endings):
        reads = "JSON lines (.jsonl), or .tsv" if examples else "PREFIX of PREFIX.bin and .idx"
        hint = "" if examples else "; `mlm-jax data build` makes them"
        raise DataError(f"{path}: data.objective={run.data.objective!r} reads {reads}{hint}")
    if examples:
        assert tokenizer is not None  # see misfits
        return ExampleFile(path, run, tokenizer, cache)
    if run.data.objective == "masked":
        assert tokenizer is not None  # see misfits
        return SentenceFile(path, run, tokenizer, cache)
    return TokenFile(path, run, tokenizer, cache)


class TokenFile:
    """PREFIX.bin and PREFIX.idx, whose windows are samples."""

    def __init__(self, path: str, run: RunConfig, tokenizer: Tokenizer | None, cache: Path | None):
        self.name, self.run, self.cache, self.fim = path, run, cache, None
        self.indexed = IndexedDataset(path)
        if self.indexed.n_tokens == 0:
            raise DataError(f"{path} holds no tokens; build it again from text")
        self.size, self.ids = len(self.indexed), None
        if run.data.objective == "spans":
            assert tokenizer is not None  # see misfits
            self.ids = t5_tokens(tokenizer)
            self.text_length = SpanRows.text_length(run.model, self.ids)
        if run.data.objective == "fim":
            assert tokenizer is not None  # see misfits
            d, tokens = run.data, fim_tokens(tokenizer, run.data.fim_tokens)
            self.fim = Fim(tokenizer, tokens, d.fim_rate, d.fim_spm_rate)

    def epoch(self, part: range, seed: int, n_samples: int | None = None) -> Rows:
        seq_len = self.text_length - 1 if self.ids else self.run.model.seq_len
        samples = GptSamples(
            self.indexed, part, n_samples=n_samples, seq_len=seq_len, seed=seed, cache=self.cache
        )
        if self.ids:
            return SpanRows(samples, self.run.model, self.ids, seed)
        return Windows(samples, self.run, self.fim, seed)

    def fingerprint(self) -> dict[str, Any]:
        return self.indexed.fingerprint()

    def check(self) -> None:
        """Looks at some ids of a local file; each sample is checked when it is read."""
        if self.run.data.masks_boundaries and not self.ids and self.indexed.lengths.max() < 2:
            raise DataError(
                f"{self.name}: every document has one token, none is predicted from another; set"
                " data.eod_mask_loss=False"
            )
        check_some_ids(self.indexed, self.run.model.vocab_size, self.name)


class Windows:
    """Samples of a token file as rows."""

    def __init__(self, samples: GptSamples, run: RunConfig, fim: Fim | None, seed: int):
        self.samples, self.fim, self.seed = samples, fim, seed
        self.name, self.vocab_size = str(samples.indexed.prefix), run.model.vocab_size
        self.view = {
            "apart": run.data.apart, "reset_positions": run.data.resets_positions,
            "mask_boundaries": run.data.masks_boundaries,
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.samples)

    def row(self, i: int) -> Row:
        pieces, padding = self.samples.pieces(i), 0
        if self.fim:
            rng = np.random.RandomState([self.seed, i])
            pieces, padding = fill_in_the_middle(pieces, rng, self.fim)
        row = causal(pieces, **self.view, padding=padding)
        check_ids(row["tokens"], self.vocab_size, self.name)
        check_ids(row["targets"][-1:], self.vocab_size, self.name)
        return row


class SentenceFile:
    """PREFIX.bin and PREFIX.idx whose sequences are sentences, of which BERT's samples are made."""

    def __init__(self, path: str, run: RunConfig, tokenizer: Tokenizer, cache: Path | None):
        self.name, self.run, self.cache = path, run, cache
        self.ids, self.continues = bert_tokens(tokenizer), tokenizer.continues_word()
        self.indexed = IndexedDataset(path)
        if self.indexed.dtype.kind not in "iu":
            raise DataError(f"{path}.bin: {self.indexed.dtype.name} values are not token ids")
        self.size = len(self.indexed.documents) - 1
        if len(self.indexed) <= self.size:
            raise DataError(
                f"{path}: a document has {len(self.indexed) / max(self.size, 1):.2g} sentences;"
                " build it with `mlm-jax data build --split_sentences`"
            )
        self.samples = functools.cache(self._samples)

    def epoch(self, part: range, seed: int, n_samples: int | None = None) -> Rows:
        del n_samples  # epochs are not shuffled together: see misfits
        m = self.run.model
        return BertRows(
            self.indexed, self.samples(part), ids=self.ids, continues=self.continues,
            seq_len=m.seq_len, token_types=m.token_types, sentence_order=m.order_head, seed=seed,
        )  # fmt: skip

    def _samples(self, part: range) -> np.ndarray:
        m, fewest = self.run.model, 2 if self.run.model.order_head else 1
        how = {"longest": m.seq_len - SPECIAL_TOKENS, "fewest": fewest, "seed": self.run.train.seed}
        documents = self.indexed.documents[part.start : part.stop + 1]
        key = {"index": "BERT, 1", **how, "documents": [part.start, part.stop]}
        key |= {"data": self.fingerprint()} if self.cache else {}
        found = cached(
            self.cache, key,
            lambda: {"samples": sample_index(self.indexed.lengths, documents, **how)},
        )["samples"]  # fmt: skip
        if not len(found):
            raise DataError(
                f"{self.name}: a split of {len(part)} documents gives no sample: none has {fewest}"
                " sentences or more; change data.split or add documents"
            )
        return found

    def fingerprint(self) -> dict[str, Any]:
        return self.indexed.fingerprint()

    def check(self) -> None:
        check_some_ids(self.indexed, self.run.model.vocab_size, self.name)


class ExampleFile:
    """Conversations or pairs, encoded at the first start and packed into samples."""

    def __init__(self, path: str, run: RunConfig, tokenizer: Tokenizer, cache: Path | None):
        self.name, self.run = path, run
        key = {
            "examples": 1, "objective": run.data.objective, "prompt": run.data.prompt,
            "file": [Path(path).suffixes, zlib.crc32(files.whole(path).data)],
            "tokenizer": [tokenizer.fingerprint(), tokenizer.eod_id, dict(tokenizer.special)],
            "chat_template": tokenizer.config.get("chat_template"),
        }  # fmt: skip
        self.arrays = cached(cache, key, lambda: joined(read_examples(path, run, tokenizer)))
        self.ends = np.cumsum(self.arrays["lengths"], dtype=np.int64)
        self.size, self.pad_id = len(self.ends), tokenizer.eod_id or 0
        self.marks = marks_of(tokenizer) if run.model.seq2seq else None
        self.packed = functools.cache(self._packed)

    def __getitem__(self, i: int) -> Example:
        span = slice(self.ends[i] - self.arrays["lengths"][i], self.ends[i])
        return Example(self.arrays["tokens"][span], self.arrays["trained"][span])

    def epoch(self, part: range, seed: int, n_samples: int | None = None) -> Rows:
        del n_samples  # epochs are not shuffled together: see misfits
        return Shuffled(self.packed(part), self.run, seed)

    def _packed(self, part: range) -> PackedExamples | PairRows:
        if self.marks:
            return PairRows([self[i] for i in part], self.run.model, self.marks)
        size, seed = self.run.model.seq_len, self.run.train.seed
        return PackedExamples([self[i] for i in part], size, pad_id=self.pad_id, seed=seed)

    def fingerprint(self) -> dict[str, Any]:
        crc32 = 0
        for name in ("lengths", "tokens", "trained"):
            crc32 = zlib.crc32(np.ascontiguousarray(self.arrays[name]).data, crc32)
        return {"examples": self.size, "tokens": len(self.arrays["tokens"]), "crc32": crc32}

    def check(self) -> None:
        check_ids(self.arrays["tokens"], self.run.model.vocab_size, self.name)


class Shuffled:
    """The same rows each epoch, in the order of a seed."""

    def __init__(self, packed: PackedExamples | PairRows, run: RunConfig, seed: int):
        self.packed = packed
        self.order = np.random.RandomState(seed).permutation(len(packed))
        kept = {"segments": run.data.apart, "positions": run.data.resets_positions}
        self.dropped = [name for name, is_kept in kept.items() if not is_kept]

    def __len__(self) -> int:
        return len(self.packed)

    def row(self, i: int) -> Row:
        row = self.packed.row(int(self.order[i]))
        return {name: x for name, x in row.items() if name not in self.dropped}


def read_examples(path: str, run: RunConfig, tokenizer: Tokenizer) -> list[Example]:
    if run.data.objective == "chat":
        return chat_examples(path, tokenizer)
    return pair_examples(path, tokenizer, prompt=run.data.prompt)


def joined(examples: Sequence[Example]) -> Mapping[str, np.ndarray]:
    """tokens int32 [N] and trained bool [N] of all examples; lengths int64 of each."""
    return {
        "lengths": np.array([len(e.tokens) for e in examples], np.int64),
        "tokens": np.concatenate([e.tokens for e in examples]),
        "trained": np.concatenate([e.trained for e in examples]),
    }


def check_some_ids(indexed: IndexedDataset, vocab_size: int, name: str) -> None:
    """Of a local file."""
    ids = indexed.dtype.kind in "iu"  # else GptSamples refuses them
    if "://" in name or not ids or np.iinfo(indexed.dtype).max < vocab_size:
        return
    for i in range(0, len(indexed), max(1, indexed.n_tokens // CHECKED_TOKENS)):
        check_ids(indexed.tokens(i), vocab_size, name)


def check_ids(tokens: np.ndarray, vocab_size: int, name: str) -> None:
    """Raises DataError where one is outside of the vocabulary."""
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        wrong = int(tokens[(tokens < 0) | (tokens >= vocab_size)][0])
        raise DataError(
            f"{name} holds token id {wrong}, beyond model.vocab_size={vocab_size}; set"
            " model.vocab_size to the size of the tokenizer that built it"
        )
