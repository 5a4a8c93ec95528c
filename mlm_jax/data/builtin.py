"""Corpora that every machine has, so that each config trains, and each test learns, offline.

`python`: the sources of Python's standard library. `prose`: English from docstrings.
`conversations`: questions and answers from docstrings, signatures and doctests. `en-fr`, `en-de`:
the message catalogues of django. mlm_jax.data.corpora has the recipes, and the licences.
"""

import dataclasses
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from mlm_jax.data.corpora import conversations, prose, python, translation
from mlm_jax.data.corpora.baselines import token_counts, unigram_bits, xz_baseline
from mlm_jax.data.corpora.sources import Example, Package, Recipe, is_held_out
from mlm_jax.data.preprocess.encoding import write_documents
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mlm_jax.data.tokenizer.training import train_bpe
from mlm_jax.errors import DataError

log = logging.getLogger(__name__)

RECIPE = 2  # count up when anything here or in corpora/ changes what is built
RECIPES = {
    "python": python.RECIPE, "prose": prose.RECIPE, "conversations": conversations.RECIPE,
    "en-fr": translation.FRENCH, "en-de": translation.GERMAN,
}  # fmt: skip
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>")
FEWEST = 50  # documents


@dataclasses.dataclass(frozen=True)
class Corpus:
    """train, valid: of objective "causal" prefixes of token files, each document closed by EOD.

    Of "chat" .jsonl files, a line {"messages": [{"role", "content"}, ...]}; of "pairs" too, a line
    {"source", "target"}.

    tokenizer    its folder
    documents    how many, of both together: files, conversations or pairs
    *_bytes      their text in UTF-8
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


def builtin_corpus(kind: str = "python", vocab_size: int = 2048, *, fim: bool = False) -> Corpus:
    """Builds the corpus on first use (some ten seconds), later finds it in the cache folder.

    fim: the last four ids of the tokenizer are fill-in-the-middle's FIM_TOKENS, which no text has;
    the others are those of a vocabulary of four fewer. For objective "causal" only.

    Raises DataError for an unknown kind, for too few ids, where the interpreter comes without
    sources or a package is missing, and where the cache cannot be written.
    """
    recipe = recipe_of(kind, vocab_size, fim)
    packages = recipe.packages()
    files = [[p.name, p.version, sorted(recipe.sizes(p.folder).items())] for p in packages]
    key = json.dumps([RECIPE, kind, platform.python_version(), vocab_size, fim, files])
    folder = cache_folder() / f"builtin-{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
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
    measured = json.loads((folder / "corpus.json").read_text())
    suffix = "" if recipe.objective == "causal" else ".jsonl"
    return Corpus(
        kind=kind,
        objective=recipe.objective,
        train=folder / f"train{suffix}",
        valid=folder / f"valid{suffix}",
        tokenizer=folder / "tokenizer",
        licence="; ".join(f"{p.name} {p.version}: {p.licence}" for p in packages),
        **measured,
    )


def recipe_of(kind: str, vocab_size: int, fim: bool) -> Recipe:
    if kind not in RECIPES:
        raise DataError(f"there is no built-in corpus {kind!r}; there are {', '.join(RECIPES)}")
    recipe = RECIPES[kind]
    if fim:
        if recipe.objective != "causal":
            raise DataError(f"the built-in corpus {kind!r} has no middles to fill in; try python")
        recipe = dataclasses.replace(recipe, last=FIM_TOKENS)
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
    return [e for e in found if not any(t in text for t in tokens for text in texts_of(e))]


def texts_of(example: Example) -> list[str]:
    """What a document says, piece by piece."""
    content = example.content
    if isinstance(content, str):
        return [content]
    if "messages" in content:
        return [message["content"] for message in content["messages"]]
    return [content["source"], content["target"]]


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
    one_in = recipe.held_out
    train = [example for example in examples if not is_held_out(example.source, one_in)]
    valid = [example for example in examples if is_held_out(example.source, one_in)]
    tokenizer = build_tokenizer(recipe, train, vocab_size, folder / "tokenizer")
    baselines = {}
    if recipe.objective == "causal":
        baselines = write_causal(train, valid, tokenizer, folder)
    else:
        for name, part in (("train", train), ("valid", valid)):
            lines = (json.dumps(example.content, ensure_ascii=False) + "\n" for example in part)
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    measured = {
        "documents": len(examples),
        "train_bytes": text_bytes(train),
        "valid_bytes": text_bytes(valid),
        "baselines": baselines,
    }
    (folder / "corpus.json").write_text(json.dumps(measured, indent=2) + "\n")


def build_tokenizer(
    recipe: Recipe, train: Sequence[Example], vocab_size: int, folder: Path
) -> Tokenizer:
    """Trained on what is trained on, the names of roles included; saved in `folder`."""
    texts = [text for example in train for text in texts_of(example)]
    if recipe.objective == "chat":
        texts += [f"{m['role']}\n" for example in train for m in example.content["messages"]]
    train_bpe(texts, vocab_size - len(recipe.last), recipe.special).save(folder)
    if recipe.last:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.add_special_tokens(list(recipe.last))
        backend.save(str(folder / "tokenizer.json"))
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | dict(recipe.settings)
    config.write_text(json.dumps(settings, indent=2) + "\n")
    return load_tokenizer(folder)


def write_causal(
    train: Sequence[Example], valid: Sequence[Example], tokenizer: Tokenizer, folder: Path
) -> dict[str, float]:
    """Writes both token files; returns the baselines."""
    texts = {"train": [e.content for e in train], "valid": [e.content for e in valid]}
    for name, part in texts.items():
        write_documents(part, tokenizer, folder / name, append_eod=True)
    counts = [token_counts(folder / name, tokenizer.vocab_size) for name in texts]
    unigram = unigram_bits(*counts) / text_bytes(valid)
    return {"unigram": unigram} | xz_baseline(texts["valid"])


def text_bytes(examples: Sequence[Example]) -> int:
    return sum(len(text.encode()) for example in examples for text in texts_of(example))
