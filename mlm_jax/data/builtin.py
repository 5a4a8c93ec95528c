"""Corpora that every machine has, so that each config trains, and each test learns, offline.

mlm_jax.data.corpora says what they are made of, and under which licences that is.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlm_jax.data.corpora import conversations, prose, python, translation
from mlm_jax.data.corpora.sources import Example, Package, Recipe, is_held_out
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.objectives.t5_spans import SENTINEL
from mlm_jax.data.preprocess.encoding import write_documents
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.data.tokenizer.fast import FastTokenizer
from mlm_jax.data.tokenizer.training import train_bpe
from mlm_jax.errors import DataError

log = logging.getLogger(__name__)

RECIPE = 3  # count up when anything here or in corpora/ changes what is built
RECIPES = {
    "python": python.RECIPE, "prose": prose.RECIPE, "conversations": conversations.RECIPE,
    "en-fr": translation.FRENCH, "en-de": translation.GERMAN, "sentences": prose.SENTENCES,
}  # fmt: skip
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>")
SPAN_TOKENS = ("<pad>", *(SENTINEL.format(i) for i in range(100)))
FEWEST = 50  # documents
WRITTEN = {  # as token files, by objective: how
    "causal": {"append_eod": True}, "masked": {"split_sentences": True},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Corpus:
    """train, valid: of objective "causal" prefixes of token files, each document closed by EOD; of
    "masked" too, whose sequences are sentences.

    Of "chat" .jsonl files, a line {"messages": [{"role", "content"}, ...]}; of "pairs" too, a line
    {"source", "target"}.

    tokenizer    its folder
    documents    how many, of both together: files, conversations or pairs
    *_bytes      their text in UTF-8, of conversations with the roles
    baselines    of "causal": bits per byte of the valid text that need no network: "unigram" codes
                 its tokens by their frequency in train; "xz" compresses it (absent if Python has no
                 lzma); of others none
    licence      what it is made from, and under which licence that is
    """

    kind: str
    objective: str
    train: Path
    valid: Path
    tokenizer: Path
    documents: int
    train_bytes: int
    valid_bytes: int
    baselines: Mapping[str, float]
    licence: str


def builtin_corpus(
    kind: str = "python", vocab_size: int = 2048, *, fim: bool = False, spans: bool = False
) -> Corpus:
    """Builds the corpus on first use (some ten seconds), later finds it in the cache folder.

    fim: the last four ids of the tokenizer are fill-in-the-middle's FIM_TOKENS, which no text has;
    the others are those of a vocabulary of four fewer. For objective "causal" only.
    spans: the same with T5's SPAN_TOKENS: padding, and the names of 100 places.

    Raises DataError for an unknown kind, for too few ids, where the interpreter comes without
    sources or a package is missing, and where the cache cannot be written.
    """
    recipe = recipe_of(kind, vocab_size, fim, spans)
    packages = recipe.packages()
    versions = [(p.name, p.version) for p in packages]
    key = hashlib.sha256(
        json.dumps([RECIPE, vocab_size, "spans" if spans else fim, versions]).encode()
    ).hexdigest()
    folder = cache_folder() / f"builtin-{kind}-{key[:16]}"
    if not folder.exists():
        log.info("building the built-in corpus %s in %s", kind, folder)
        examples = usable(recipe, packages)
        if len(examples) < FEWEST:
            read = f"{kind}, from {', '.join(str(p.folder) for p in packages)}"
            found = f"{read}: {len(examples)} usable documents, fewer than {FEWEST}"
            raise DataError(f"{found}; this Python has no such built-in corpus, set data.path")
        try:
            build_whole(recipe, examples, vocab_size, folder)
        except OSError as error:
            hint = "set MLM_JAX_CACHE to a folder that can"
            raise DataError(f"{folder}: cannot be written: {error}; {hint}") from None
    suffix = "" if recipe.objective in WRITTEN else ".jsonl"
    return Corpus(
        kind=kind,
        objective=recipe.objective,
        train=folder / f"train{suffix}",
        valid=folder / f"valid{suffix}",
        tokenizer=folder / "tokenizer",
        licence="; ".join(f"{p.name} {p.version}: {p.licence}" for p in packages),
        **json.loads((folder / "corpus.json").read_text()),
    )


def recipe_of(kind: str, vocab_size: int, fim: bool, spans: bool = False) -> Recipe:
    if kind not in RECIPES:
        raise DataError(f"there is no built-in corpus {kind!r}; there are {', '.join(RECIPES)}")
    recipe = RECIPES[kind]
    if fim:
        if recipe.objective != "causal":
            raise DataError(f"the built-in corpus {kind!r} has no middles to fill in; try python")
        recipe = dataclasses.replace(recipe, last=FIM_TOKENS)
    if spans:
        settings = {**recipe.settings, "pad_token": SPAN_TOKENS[0]}
        recipe = dataclasses.replace(recipe, last=SPAN_TOKENS, settings=settings)
    if vocab_size < (least := 256 + len(recipe.special) + len(recipe.last)):
        small = f"vocab_size={vocab_size} is too small for the built-in corpus {kind!r}"
        raise DataError(f"{small}; try {least} or more")
    return recipe


def cache_folder() -> Path:
    """MLM_JAX_CACHE, or mlm_jax in XDG_CACHE_HOME or in ~/.cache."""
    if own := os.environ.get("MLM_JAX_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "mlm_jax"
    try:
        return Path.home() / ".cache" / "mlm_jax"
    except RuntimeError:
        raise DataError("there is no home folder for the cache: set MLM_JAX_CACHE") from None


def usable(recipe: Recipe, packages: list[Package]) -> list[Example]:
    """Without those in which a special token is spelt out: it would be read as that token."""
    tokens = (*recipe.special, *recipe.last)
    found = recipe.harvest(packages)
    return [e for e in found if not any(t in text for t in tokens for text in texts(e.content))]


def texts(content: Any) -> Iterator[str]:
    """All that an example's content says, piece by piece; roles too."""
    if isinstance(content, str):
        yield content
    else:
        for part in content.values() if isinstance(content, dict) else content:
            yield from texts(part)


def build_whole(recipe: Recipe, examples: Sequence[Example], vocab_size: int, folder: Path) -> None:
    """The folder appears when it is complete, whoever else builds it and whatever kills us."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as temporary:
        build(recipe, examples, vocab_size, Path(temporary) / "corpus")
        try:
            (Path(temporary) / "corpus").rename(folder)
        except OSError:
            if not folder.exists():  # or another process was faster, and built the same
                raise


def build(recipe: Recipe, examples: Sequence[Example], vocab_size: int, folder: Path) -> None:
    parts: dict[str, list[Any]] = {"train": [], "valid": []}
    for source, content in examples:
        parts["valid" if is_held_out(source, recipe.held_out) else "train"].append(content)
    tokenizer = build_tokenizer(recipe, texts(parts["train"]), vocab_size)
    tokenizer.save(folder / "tokenizer")
    for name, contents in parts.items():
        if how := WRITTEN.get(recipe.objective):
            write_documents(contents, tokenizer, folder / name, **how)
        else:
            lines = "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in contents)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    measured = {
        "documents": len(examples),
        **{f"{name}_bytes": sum(len(t.encode()) for t in texts(c)) for name, c in parts.items()},
        "baselines": {},
    }
    if recipe.objective == "causal":
        measured["baselines"] = baselines(folder, parts["valid"], tokenizer.vocab_size)
    (folder / "corpus.json").write_text(json.dumps(measured, indent=2) + "\n")


def build_tokenizer(recipe: Recipe, trained: Iterator[str], vocab_size: int) -> Tokenizer:
    size, lowercase = vocab_size - len(recipe.last), recipe.objective == "masked"
    backend = train_bpe(trained, size, recipe.special, lowercase=lowercase).backend
    backend.add_special_tokens(list(recipe.last))
    return FastTokenizer(backend, recipe.settings)


def baselines(folder: Path, valid: Sequence[str], vocab_size: int) -> dict[str, float]:
    """Bits per byte that need no network; each token counts once more than it was seen."""
    data = "".join(valid).encode()
    seen, coded = (token_counts(folder / name, vocab_size) for name in ("train", "valid"))
    found = {"unigram": float(coded @ np.log2((seen.sum() + len(seen)) / (seen + 1))) / len(data)}
    with contextlib.suppress(ImportError):  # a Python built without liblzma
        import lzma

        found["xz"] = 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    return found


def token_counts(prefix: Path, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: how often each id is in a token file."""
    indexed = IndexedDataset(prefix)
    tokens = np.concatenate([indexed.tokens(i) for i in range(len(indexed))])
    return np.bincount(tokens, minlength=vocab_size)
