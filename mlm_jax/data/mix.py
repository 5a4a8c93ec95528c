"""What data.path, data.valid_path and data.split name: files, with their parts and shares."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlm_jax.config import RunConfig
from mlm_jax.data.blend import Blend, read_blends
from mlm_jax.data.blend_order import normalised
from mlm_jax.data.builtin import (
    FIM_TOKENS,
    RECIPES,
    SPAN_TOKENS,
    Corpus,
    builtin_corpus,
    cache_folder,
)
from mlm_jax.data.sampling import split_ranges
from mlm_jax.data.sources import Source, open_source
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mlm_jax.errors import DataError
from mlm_jax.misfits import BUILTIN

BUILTIN_VOCAB = 2048


class Part(NamedTuple):
    """documents: those of the source that belong to a split."""

    source: Source
    documents: range


class Mix(NamedTuple):
    """What a split is read from. weights: of the parts; None: by their sizes."""

    parts: tuple[Part, ...]
    weights: tuple[float, ...] | None

    def fingerprint(self) -> dict[str, Any]:
        """What a run that goes on must find again."""
        parts = [
            part.source.fingerprint() | {"from": part.documents.start, "to": part.documents.stop}
            for part in self.parts
        ]
        if len(parts) == 1 and self.weights is None:
            return parts[0]
        return {"parts": parts} | ({"weights": normalised(self.weights)} if self.weights else {})


class Files(NamedTuple):
    """valid: None where no document is for it. corpus: a built-in one, or None."""

    train: Mix
    valid: Mix | None
    tokenizer: Tokenizer | None
    corpus: Corpus | None


def open_files(run: RunConfig) -> Files:
    """Raises DataError naming the setting behind what is missing or damaged."""
    d, cache, tokenizer = run.data, index_cache(run), None
    if d.path is None:
        corpus = open_corpus(run)
        tokenizer = load_tokenizer(corpus.tokenizer)
        train, valid = (
            whole([open_source(str(path), run, tokenizer, cache)], None)
            for path in (corpus.train, corpus.valid)
        )
        return Files(train, valid, tokenizer, corpus)
    if d.tokenizer:
        with naming(f"data.tokenizer={d.tokenizer!r}"):
            tokenizer = load_tokenizer(d.tokenizer)

    def opened(setting: str, path: str, blend: Blend) -> list[Source]:
        sources, problems = [], []
        for prefix in blend.prefixes:
            try:
                sources.append(open_source(os.path.expanduser(prefix), run, tokenizer, cache))
            except DataError as problem:
                problems.append(f"{problem}{prefixes_near(prefix)}")
        with naming(f"{setting}={path!r}"):
            if problems:
                hint = "; a path with spaces is written 'in quotes'" * (not sources and " " in path)
                raise DataError("\n  ".join(problems) + hint)
        return sources

    blend, held_out = read(run)
    sources = opened("data.path", d.path, blend)
    if held_out is blend:
        return Files(*split(sources, blend.weights, d.split), tokenizer, None)
    train, valid = whole(sources, blend.weights), None
    if held_out is not None:
        apart = opened("data.valid_path", d.valid_path or d.path, held_out)
        valid = whole(apart, held_out.weights)
    return Files(train, valid, tokenizer, None)


def read(run: RunConfig) -> tuple[Blend, Blend | None]:
    """Of training and of validation: the same one where both have parts of its documents."""
    d = run.data
    with naming(f"data.path={d.path!r}"):
        blend = read_blends(str(d.path))
    if isinstance(blend, dict):
        if d.valid_path or d.split != type(d).split or "train" not in blend:
            raise DataError(
                f"data.path={d.path!r} has a blend for each split: it needs 'train', and goes"
                " without data.valid_path and data.split"
            )
        return alone(blend["train"]), alone(blend["valid"]) if "valid" in blend else None
    if d.valid_path is None:
        return blend, blend
    with naming(f"data.valid_path={d.valid_path!r}"):
        held_out = read_blends(d.valid_path)
        if isinstance(held_out, dict):
            raise DataError("it has a blend for each split; set data.path to it")
    return alone(blend), alone(held_out)


def alone(blend: Blend) -> Blend:
    """Without a weight if it is of one: as Megatron-LM takes it where splits have their files."""
    return blend if len(blend.prefixes) > 1 else Blend(blend.prefixes)


def whole(sources: list[Source], weights: tuple[float, ...] | None) -> Mix:
    return Mix(tuple(Part(source, range(source.size)) for source in sources), weights)


def split(
    sources: list[Source], weights: tuple[float, ...] | None, shares: str
) -> tuple[Mix, Mix | None]:
    """The documents of each source that are for training and, unless its share is 0, validation."""
    with naming("data.split"):
        ranges = [split_ranges(shares, source.size) for source in sources]
    for source, (_, held_out, _) in zip(sources, ranges, strict=True):
        if not held_out and any(map(float, shares.replace(",", " ").split()[1:2])):
            raise DataError(
                f"data.split={shares!r} leaves none of {source.size} documents for validation in"
                f" {source.name}; give it a larger part, or 0"
            )
    train, valid = (
        Mix(tuple(Part(s, r[n]) for s, r in zip(sources, ranges, strict=True)), weights)
        for n in (0, 1)
    )
    return train, valid if valid.parts[0].documents else None


def open_corpus(run: RunConfig) -> Corpus:
    fim, spans = (run.data.objective == name for name in ("fim", "spans"))
    kind = run.data.builtin or BUILTIN[run.data.objective][0]
    last = fim * len(FIM_TOKENS) + spans * len(SPAN_TOKENS)
    least = 256 + len(RECIPES[kind].special) + last
    if run.model.vocab_size < least:
        raise DataError(
            f"model.vocab_size={run.model.vocab_size} is too small for the built-in corpus; try"
            f" {least} or more, or set data.path"
        )
    return builtin_corpus(kind, min(BUILTIN_VOCAB, run.model.vocab_size), fim=fim, spans=spans)


def index_cache(run: RunConfig) -> Path:
    own = run.data.index_cache
    return Path(own).expanduser() if own else cache_folder() / "indices"


@contextlib.contextmanager
def naming(setting: str) -> Iterator[None]:
    """A DataError from within names the setting behind it."""
    try:
        yield
    except DataError as why:
        raise DataError(f"{setting}: {why}") from None


def prefixes_near(path: str) -> str:
    """'; try a or b': prefixes that a path to a file or a folder may stand for."""
    stem = path.removesuffix(".bin").removesuffix(".idx")
    found = [Path(f"{stem}.idx"), *sorted(Path(path).glob("*.idx"))]
    there = [str(idx)[: -len(".idx")] for idx in found if idx.exists()]
    there = [prefix for prefix in there if prefix != path]
    return f"; try {' or '.join(there[:3])}" if there else ""
