"""First weights of a run from a model that is there: a run's, a converted one, Hugging Face's."""

from pathlib import Path
from typing import Protocol

from flax import nnx

from mlm_jax.checkpoint.hf import HfFolder
from mlm_jax.checkpoint.hf_config import canonical, same
from mlm_jax.checkpoint.hf_files import read_json
from mlm_jax.checkpoint.manager import Checkpoints
from mlm_jax.checkpoint.workdir import read_run, saved_tokenizer
from mlm_jax.config import ModelConfig, RunConfig
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mlm_jax.errors import CheckpointError, ConfigError, DataError
from mlm_jax.layout import Layout
from mlm_jax.models import declare

# What may change with model.seq_len, where positions are no weights: for a longer context.
CONTEXT = {
    "seq_len", "target_len", "window", "rotary_base", "rotary_local_base", "rope_scaling",
    "rope_factor", "rope_original_seq_len", "rope_low", "rope_high",
}  # fmt: skip


class Weights(Protocol):
    @property
    def model(self) -> ModelConfig: ...
    def tokenizer(self) -> Tokenizer | None: ...
    def params(self, model: ModelConfig, layout: Layout) -> nnx.State: ...


class RunFolder:
    """The newest weights of a run."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, read_run(folder).model

    def tokenizer(self) -> Tokenizer | None:
        saved = saved_tokenizer(self.folder)
        return load_tokenizer(saved) if saved else None

    def params(self, model: ModelConfig, layout: Layout) -> nnx.State:
        declared = nnx.state(declare(model, layout), nnx.Param)
        with Checkpoints(self.folder) as checkpoints:
            return checkpoints.restore_params(layout.placed(declared))


def open_source(run: RunConfig, tokenizer: Tokenizer | None) -> Weights:
    """The model at run.init_from, none of whose weights has been read.

    tokenizer: of the data, if it is known.

    Raises ConfigError where it is another model than run.model, DataError where it has another
    tokenizer, and CheckpointError where it is none.
    """
    folder = Path(str(run.init_from)).expanduser()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"init_from={run.init_from!r} is no model: it has no config.json")
    source = (
        RunFolder(folder) if "format" in read_json(folder / "config.json") else HfFolder(folder)
    )
    if differ := differences(run.model, source.model):
        raise ConfigError(
            f"init_from={run.init_from!r} holds another model than this; what would agree:\n  "
            + "\n  ".join(differ)
        )
    there = source.tokenizer()
    if tokenizer and there and not there.same_as(tokenizer):
        folder = folder / "tokenizer" if isinstance(source, RunFolder) else folder
        raise DataError(
            f"init_from={run.init_from!r} has another tokenizer than the data; tokenize these with"
            f" it: data.tokenizer={str(folder)!r}"
        )
    return source


def differences(wanted: ModelConfig, found: ModelConfig) -> list[str]:
    """Settings under which weights would not be what they were, with those of the weights."""
    here, there = canonical(wanted), canonical(found)
    free = CONTEXT if wanted.seq_len != found.seq_len and wanted.positions != "learned" else set()
    return [
        f"model.{key}={getattr(found, key)!r}, not {getattr(wanted, key)!r}"
        for key in sorted(here.keys() | there.keys())
        if not same(here.get(key), there.get(key))
        and key not in free
        and not same(getattr(found, key), getattr(wanted, key))  # else another setting decides it
    ]
