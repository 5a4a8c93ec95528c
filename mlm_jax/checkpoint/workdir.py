"""A run's folder: what it was asked for, its tokenizer, and its model again."""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from mlm_jax.checkpoint.manager import Checkpoints
from mlm_jax.checkpoint.manifest import checksums, differences
from mlm_jax.config import KEYS, RunConfig
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mlm_jax.door import ABOUT, from_dict
from mlm_jax.errors import CheckpointError, ConfigError
from mlm_jax.layout import Layout
from mlm_jax.models import declare

log = logging.getLogger(__name__)

FORMAT = 1
# What a run cannot change on its way: its weights and its batches would be those of another run.
FREE = (
    "model.attention", "model.dropout", "model.dtype", "model.norm_eps",
    "data.path", "data.tokenizer",  # of which the content counts
    "data.valid_path", "data.index_cache", "data.workers",
)  # fmt: skip
FIXED = (
    *(key for key in KEYS if key.startswith(("model.", "data.")) and key not in FREE),
    "train.seed",
    "train.global_batch_size",
    "train.batch_schedule",
    "optimizer.name",
)


def check_same_run(
    workdir: Path, run: RunConfig, tokenizer: Tokenizer | None, fingerprint: dict[str, Any]
) -> None:
    """Raises CheckpointError where workdir holds another run."""
    if not (workdir / "config.json").exists():
        if any((workdir / "checkpoints").glob("[0-9]*")):
            raise CheckpointError(f"workdir {workdir} has checkpoints but no config.json")
        return
    if "origin" in read_content(workdir):
        raise CheckpointError(
            f"workdir {workdir} holds a converted model, which stays as it is; to go on from it,"
            f" give --config.init_from={workdir} and another --workdir"
        )
    saved = saved_tokenizer(workdir)
    if tokenizer and saved and not load_tokenizer(saved).same_as(tokenizer):
        builtin = " (the built-in corpus: by another version of Python)" * (run.data.path is None)
        raise CheckpointError(
            f"workdir {workdir} was trained with another tokenizer{builtin}, whose ids or special"
            " tokens are others; choose another workdir"
        )
    there, here = (_flat(r.to_dict()) for r in (read_run(workdir), run))
    differ = [f"{k} is {there[k]!r} there, {here[k]!r} here" for k in FIXED if there[k] != here[k]]
    data = read_content(workdir).get("fingerprint", fingerprint)
    if data.get("samples") != fingerprint.get("samples"):
        differ += ["train.steps asks for other samples, which data.epochs='together' shuffles"]
    elif data != fingerprint:
        keys = [k for k in data | fingerprint if data.get(k) != fingerprint.get(k)]
        told = (f"{k} {data.get(k)} there, {fingerprint.get(k)} here" for k in keys)
        differ += [f"data.path={run.data.path!r} holds other data: {'; '.join(told)}"]
    if differ:
        raise CheckpointError(
            f"workdir {workdir} holds a run with other settings; choose another workdir, or set"
            " these back:\n  " + "\n  ".join(differ)
        )


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other processes from training in workdir, which is made where there is none.

    The system frees the lock however this process ends. The file stays, as a removed one could be
    locked twice. Of a run over several processes only the lead locks. NFS keeps the lock between
    machines (Linux since 2.6.12) unless mounted with local_lock=flock.

    Raises CheckpointError where another process trains, or nothing can be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("a+")
    except OSError as why:  # trying it is the only test: os.access tells root yes
        raise CheckpointError(
            f"{workdir} is no folder that can be written ({why.strerror}); choose another workdir"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CheckpointError(
                f"workdir {workdir} is in use by {file.read().strip() or 'another process'}; stop"
                " that run first, or choose another workdir"
            ) from None
        except OSError as why:
            log.warning("%s has no locks (%s): start one run only", workdir, why.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def write_run(
    workdir: Path, run: RunConfig, tokenizer: Tokenizer | None, fingerprint: dict[str, Any],
    origin: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """tokenizer/ and config.json, so that the folder alone is enough to use the model.

    origin: of a converted model, what was known of it there.

    config.json comes last and at once: it carries checksums of both, as another norm_eps or another
    order of tokens would spoil a model as silently as another weight.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        _keep_tokenizer(workdir, tokenizer)
    packages = ("mlm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {p: importlib.metadata.version(p) for p in packages}
    versions["python"] = platform.python_version()
    content = {"format": FORMAT, "versions": versions, "fingerprint": fingerprint}
    content |= run.to_dict() | ({"origin": origin} if origin is not None else {})
    own = _checksum(json.loads(json.dumps(content)))  # as it will be read
    written = checksums(workdir, "tokenizer") | {"config.json": own}
    text = json.dumps(content | {"checksums": written}, indent=1)
    part = workdir / "config.json.part"
    part.write_text(text + "\n")
    os.replace(part, workdir / "config.json")


def _keep_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Where there is a config.json, check_same_run has compared; else a start was killed here."""
    saved, begun = saved_tokenizer(workdir), (workdir / "config.json").exists()
    if saved and (begun or load_tokenizer(saved).same_as(tokenizer)):
        return
    shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
    tokenizer.save(workdir / "tokenizer")


def _checksum(content: Mapping[str, Any]) -> str:
    """Of what config.json says, less its checksums; not of how the text is laid out."""
    said = {key: value for key, value in content.items() if key != "checksums"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def saved_tokenizer(workdir: Path) -> Path | None:
    """The folder of the run's tokenizer, if it was saved whole; its config is written last.

    Raises CheckpointError where its files are not those that config.json has checksums of.
    """
    folder = workdir / "tokenizer"
    content = read_content(workdir) if (workdir / "config.json").exists() else {}
    if "checksums" in content:
        written = {name: d for name, d in content["checksums"].items() if name != "config.json"}
        try:
            wrong = differences(written, checksums(workdir, "tokenizer"))
        except OSError as why:
            wrong = [f"{why.filename} cannot be read ({why.strerror})"]
        if wrong:
            raise CheckpointError(
                f"{workdir}: {', '.join(wrong)}; copy it again from where it is whole. If you"
                " changed it on purpose, remove `checksums` from config.json"
            )
    return folder if (folder / "tokenizer_config.json").exists() else None


def damage_of_run(workdir: Path) -> list[str]:
    """What is wrong with config.json and tokenizer/; empty if they are as they were written."""
    try:
        read_run(workdir)
        saved_tokenizer(workdir)
    except CheckpointError as why:
        return [str(why)]
    return []


def read_run(workdir: Path) -> RunConfig:
    """The settings in workdir/config.json. Raises CheckpointError where they cannot be read."""
    content = read_content(workdir)
    try:
        return from_dict({k: v for k, v in content.items() if k not in ABOUT})
    except ConfigError as why:
        raise CheckpointError(f"{workdir / 'config.json'}: {why}") from None


def read_content(workdir: Path) -> dict[str, Any]:
    """All of workdir/config.json."""
    path = workdir / "config.json"
    try:
        content = json.loads(path.read_text())
        found = content["format"]
        carried = "checksums" in content  # else an earlier version wrote it
        changed = carried and content["checksums"]["config.json"] != _checksum(content)
    except FileNotFoundError:
        raise CheckpointError(f"{workdir} holds no run: there is no {path}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as why:
        raise CheckpointError(f"{path} cannot be read: {why}") from None
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}; this version reads format {FORMAT}")
    if changed:
        raise CheckpointError(
            f"{path} is not what was written; copy it again from where it is whole. If you changed"
            " it on purpose, remove `checksums` from it"
        )
    return content


def load(workdir: Path | str, step: int | None = None, layout: Layout | None = None) -> Any:
    """The model of a run, at a step or the newest, under a layout (default: the first device).

    It carries `model.tokenizer`, None if the run had none, `model.run`, and `model.origin`, None if
    it is no converted model.
    """
    workdir = Path(workdir)
    run, saved = read_run(workdir), saved_tokenizer(workdir)
    layout = (layout or Layout.create(jax.devices()[:1])).fit(run.model)
    graphdef, declared = nnx.split(declare(run.model, layout), nnx.Param)
    with Checkpoints(workdir) as checkpoints:
        params = checkpoints.restore_params(layout.placed(declared), step)
    model = nnx.merge(graphdef, params)
    model.tokenizer = load_tokenizer(saved) if saved else None
    model.run, model.origin = run, read_content(workdir).get("origin")
    return model


def _flat(values: dict) -> dict:
    return {
        f"{section}.{key}": value
        for section, group in values.items()
        if isinstance(group, dict)
        for key, value in group.items()
    }
