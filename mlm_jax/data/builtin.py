"""A corpus that every machine has: the sources of Python's standard library.

It lets each config train, and each test learn, without a network. Its size is stable across Python
versions (about 370 files, 7.6 MB); its bytes are not.
"""

import ast
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import sysconfig
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mlm_jax.data.bpe_trainer import train_bpe
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.preprocess import write_documents
from mlm_jax.errors import DataError

log = logging.getLogger(__name__)

RECIPE = 1  # count up when anything below changes what is built
# Tests, tables and third parties: little like the code a person writes.
SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "distutils", "tkinter", "turtledemo"}
SKIPPED |= {"encodings", "pydoc_data", "ensurepip", "msilib", "site-packages", "dist-packages"}
SKIPPED |= {"__pycache__"}
FEWEST_FILES = 50


@dataclasses.dataclass(frozen=True)
class Corpus:
    """train, valid: prefixes of token files, one document a source file, each closed by EOD.

    tokenizer    its folder
    files        how many, of both together
    *_bytes      their text in UTF-8
    baselines    bits per byte of the valid text that need no network: "unigram" codes its tokens
                 by their frequency in train; "xz" compresses it (absent if Python has no lzma)
    """

    train: Path
    valid: Path
    tokenizer: Path
    files: int
    train_bytes: int
    valid_bytes: int
    baselines: Mapping[str, float]


def builtin_corpus(vocab_size: int = 2048) -> Corpus:
    """Builds the corpus on first use (about ten seconds), later finds it in the cache folder.

    Raises DataError where the interpreter comes without sources or the cache cannot be written.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sizes = source_sizes(stdlib)
    key = json.dumps([RECIPE, platform.python_version(), vocab_size, sorted(sizes.items())])
    folder = cache_folder() / f"builtin-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not folder.exists():
        log.info("building the built-in corpus in %s", folder)
        texts = read_sources(stdlib, sorted(sizes))
        if len(texts) < FEWEST_FILES:
            found = f"{stdlib}: {len(texts)} usable Python sources, fewer than {FEWEST_FILES}"
            raise DataError(f"{found}; this Python has no built-in corpus, set data.path")
        try:
            build_whole(texts, vocab_size, folder)
        except OSError as error:
            hint = "set MLM_JAX_CACHE to a folder that can"
            raise DataError(f"{folder}: cannot be written: {error}; {hint}") from None
    measured = json.loads((folder / "corpus.json").read_text())
    return Corpus(folder / "train", folder / "valid", folder / "tokenizer", **measured)


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


def build_whole(texts: Mapping[str, str], vocab_size: int, folder: Path) -> None:
    """The folder appears when it is complete, whoever else builds it and whatever kills us."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as temporary:
        build(texts, vocab_size, Path(temporary) / "corpus")
        try:
            (Path(temporary) / "corpus").rename(folder)
        except OSError:
            if not folder.exists():  # or another process was faster, and built the same
                raise


def is_held_out(name: str) -> bool:
    """One file in twenty, by its path, so that a file stays where it is in every version."""
    return int(hashlib.sha1(name.encode()).hexdigest(), 16) % 20 == 0


def build(texts: Mapping[str, str], vocab_size: int, folder: Path) -> None:
    train = [text for name, text in texts.items() if not is_held_out(name)]
    valid = [text for name, text in texts.items() if is_held_out(name)]
    tokenizer = train_bpe(train, vocab_size)
    tokenizer.save(folder / "tokenizer")
    in_train = write_documents(train, tokenizer, folder / "train", append_eod=True)
    in_valid = write_documents(valid, tokenizer, folder / "valid", append_eod=True)
    counts = [token_counts(folder / name, tokenizer.vocab_size) for name in ("train", "valid")]
    measured = {
        "files": in_train.documents + in_valid.documents,
        "train_bytes": in_train.text_bytes,
        "valid_bytes": in_valid.text_bytes,
        "baselines": {"unigram": unigram_bits(*counts) / in_valid.text_bytes} | xz_baseline(valid),
    }
    (folder / "corpus.json").write_text(json.dumps(measured, indent=2) + "\n")


def source_sizes(stdlib: Path) -> dict[str, int]:
    """Bytes of each candidate, by its path below stdlib."""
    sizes = {}
    for parent, folders, names in os.walk(stdlib):
        folders[:] = [f for f in folders if f not in SKIPPED and not f.startswith("config-")]
        for file in (Path(parent, name) for name in names if name.endswith(".py")):
            if file.name.startswith("_sysconfigdata") or not file.is_file():  # a dead link
                continue
            if 200 <= (size := file.stat().st_size) <= 200_000:
                sizes[file.relative_to(stdlib).as_posix()] = size
    return sizes


def read_sources(stdlib: Path, names: Sequence[str]) -> dict[str, str]:
    """The candidates that read like code, without repetitions, by their names."""
    texts = {}
    for name in names:
        with contextlib.suppress(UnicodeDecodeError):
            text = (stdlib / name).read_text(encoding="utf-8").replace("\t", "    ")
            if is_code(text):
                texts.setdefault(hashlib.sha1(text.encode()).digest(), (name, text))
    return dict(texts.values())


def is_code(text: str) -> bool:
    readable = sum(c.isalpha() or c.isspace() for c in text) >= 0.6 * len(text)
    if not readable or max(map(len, text.split("\n"))) > 400:  # a table, not code
        return False
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True


def token_counts(prefix: Path, vocab_size: int) -> np.ndarray:
    indexed = IndexedDataset(prefix)
    tokens = np.concatenate([indexed.tokens(i) for i in range(len(indexed))])
    return np.bincount(tokens, minlength=vocab_size)


def unigram_bits(train: np.ndarray, valid: np.ndarray) -> float:
    """Bits of the valid tokens under the train frequencies, each count one higher than seen."""
    return float(valid @ np.log2((train.sum() + len(train)) / (train + 1)))


def xz_baseline(texts: Sequence[str]) -> dict[str, float]:
    try:
        import lzma  # a Python built without liblzma has none
    except ImportError:
        return {}
    data = "".join(texts).encode()
    return {"xz": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)}
