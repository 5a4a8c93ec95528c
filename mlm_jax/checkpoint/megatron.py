"""Checkpoints of Megatron-LM: GPT and Llama-style models, in."""

import logging
from pathlib import Path
from typing import Any

from flax import nnx

from mlm_jax.checkpoint.megatron_args import (
    Flags,
    Translation,
    model_settings,
    of_namespace,
    vocabulary,
)
from mlm_jax.checkpoint.megatron_files import FILE, TABLES, Distributed, Ranks
from mlm_jax.checkpoint.names import MEGATRON
from mlm_jax.checkpoint.streaming import Shape, read_params
from mlm_jax.config import ModelConfig
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mlm_jax.door import from_dict
from mlm_jax.errors import CheckpointError, ConfigError, DataError
from mlm_jax.layout import Layout
from mlm_jax.models import declare

log = logging.getLogger(__name__)
LATEST = "latest_checkpointed_iteration.txt"


class MegatronFolder:
    """A checkpoint, of torch_dist or of a file a rank, its weights not read yet.

    folder     what Megatron-LM saves to, then its newest checkpoint counts; or an iter_ folder
    tokenizer  file or folder; None: the vocabulary is what the arguments say of it
    flags      of a launch script, of_script(text)[0], where a checkpoint has no arguments

    Raises CheckpointError where it is not whole, or holds a model that cannot be built; DataError
    for a tokenizer that cannot be read, or has more ids than the model has vectors.
    """

    def __init__(
        self, folder: Path | str, tokenizer: Path | str | None = None, flags: Flags | None = None
    ):
        self.folder = newest(Path(folder))
        self.tokenizer: Tokenizer | None = load_tokenizer(tokenizer) if tokenizer else None
        distributed = (self.folder / ".metadata").exists()
        self.files = (Distributed if distributed else Ranks)(self.folder)
        args = getattr(self.files.args, "__dict__", {})
        if not args and not flags:
            raise CheckpointError(
                f"{self.folder} has no arguments of Megatron-LM; give the script that started it"
            )
        self.model = self._model(of_namespace(args) | (flags or {}))
        self.source = TrueRows(self.files, self.model.vocab_size)
        self.origin = {
            "format": "megatron", "checkpoint": "torch_dist" if distributed else "legacy",
            "folder": str(self.folder),
        }  # fmt: skip

    def _model(self, flags: Flags) -> ModelConfig:
        table, places = TABLES[0], "embedding.position_embeddings.weight"
        there = self.files.names
        if table not in there:
            raise CheckpointError(f"{self.folder} does not hold a model of ours: it lacks {table}")
        t = Translation(flags)
        if places in there:  # a learned table may be longer than the texts trained on
            t.flags = {**t.flags, "seq-length": self.files.shape(places)[0]}
        model_settings(t)
        if t.problems:
            told = "\n  ".join(t.problems)
            raise CheckpointError(f"{self.folder} holds a model that cannot be built:\n  {told}")
        rows = self.files.shape(table)[0]
        t.set("model.vocab_size", self._vocabulary(vocabulary(t), rows))
        t.set("model.dtype", "bfloat16" if t.on("bf16") or t.on("fp16") else None)
        try:
            return from_dict(t.nested()).model
        except ConfigError as why:
            raise CheckpointError(
                f"{self.folder} holds a model that cannot be built: {why}"
            ) from why

    def _vocabulary(self, said: int | None, rows: int) -> int:
        if self.tokenizer:
            if self.tokenizer.vocab_size > rows:
                raise DataError(
                    f"this tokenizer has {self.tokenizer.vocab_size} ids, and the model of"
                    f" {self.folder} vectors for {rows}; they are not of one another"
                )
            return self.tokenizer.vocab_size
        if said is None:
            log.warning(
                "%s does not say how large its vocabulary is: all %d rows of the table count as"
                " tokens, padding too, unless a tokenizer is given", self.folder, rows,
            )  # fmt: skip
        return said or rows

    def params(self, model: ModelConfig, layout: Layout) -> nnx.State:
        """The weights, straight where the layout wants them."""
        declared = nnx.state(declare(model, layout), nnx.Param)
        return read_params(declared, MEGATRON, self.source, model, layout)


class TrueRows:
    """A Source whose tables end with the vocabulary: padding depends on the TP of a run."""

    def __init__(self, files: Distributed | Ranks, vocab_size: int):
        self.files, self.vocab_size = files, vocab_size

    def __str__(self) -> str:
        return str(self.files)

    @property
    def names(self) -> set[str]:
        return self.files.names

    def shape(self, name: str) -> Shape:
        rows, *rest = self.files.shape(name)
        return (min(rows, self.vocab_size) if name in TABLES else rows, *rest)

    def read(self, name: str) -> Any:
        whole = self.files.read(name)
        return whole[: self.vocab_size] if name in TABLES else whole


def newest(folder: Path) -> Path:
    """The folder of the newest checkpoint; folder itself where it is one."""
    if (folder / ".metadata").exists() or any(folder.glob(f"mp_rank_*/{FILE}")):
        return folder
    if not (folder / LATEST).is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint of Megatron-LM: it has neither {LATEST} nor .metadata nor"
            f" mp_rank_00/{FILE}"
        )
    said = (folder / LATEST).read_text(errors="replace").strip()
    if said != "release" and not said.isdecimal():
        raise CheckpointError(f"{folder / LATEST} says {said[:40]!r}, not an iteration or release")
    inside = folder / (said if said == "release" else f"iter_{int(said):07d}")
    if not inside.is_dir():
        raise CheckpointError(f"{folder / LATEST} says {said}, but there is no {inside.name}")
    return inside
