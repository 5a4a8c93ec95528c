"""Models of Hugging Face's format: in, and (hf_export) out."""

import logging
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from mlm_jax.checkpoint.hf_config import make_of, read_config
from mlm_jax.checkpoint.hf_files import open_folder, read_json, renamed
from mlm_jax.checkpoint.streaming import read_params
from mlm_jax.config import ModelConfig, RunConfig
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mlm_jax.data.tokenizer import find as find_tokenizer
from mlm_jax.errors import CheckpointError, DataError
from mlm_jax.layout import Layout
from mlm_jax.models import declare

log = logging.getLogger(__name__)


class HfFolder:
    """A folder as save_pretrained writes it: model, tensors and tokenizer, none of them read yet.

    origin: what an export needs to know of it again.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise CheckpointError(
                f"{self.folder} is no model of Hugging Face: it has no config.json"
            )
        self.config = read_json(self.folder / "config.json")
        kind, make = make_of(self.config)
        files = open_folder(self.folder)
        self.table = make.table
        self.source = renamed(files, make.table, make.prefix, make.ignored)
        for copy, of in make.copies.items():
            if {copy, of} <= self.source.names and not self.source.repeats(of, copy):
                raise CheckpointError(f"{self.folder}: {copy} is not {of}, which is both here")
            if of in self.source.names:
                self.source = self.source.without(copy)
        self.model = self._model()
        generation = self.folder / "generation_config.json"
        self.origin = {
            "format": "huggingface", "model_type": kind,
            "ids": {k: v for k, v in self.config.items() if k.endswith("_token_id")},
            "generation": read_json(generation) if generation.is_file() else None,
        }  # fmt: skip

    @property
    def run(self) -> RunConfig:
        return RunConfig(model=self.model, name=self.folder.absolute().name)

    def _model(self) -> ModelConfig:
        """A head that is the table is left out, or stored again (pytorch_model.bin).

        Where another is there, it counts, whatever config.json says: so in transformers 5.
        """
        of = {row.ours[0]: row.theirs[0] for row in self.table}
        table, head = of["embedding.tokens"], of.get("head.weight", "")
        model = read_config(self.config, self.source.names - {head})
        if model.tied and head in self.source.names:
            if not self.source.repeats(table, head):
                return read_config(self.config, self.source.names)
            self.source = self.source.without(head)
        return model

    def params(self, model: ModelConfig, layout: Layout) -> nnx.State:
        """The weights, straight where the layout wants them."""
        declared = nnx.state(declare(model, layout), nnx.Param)
        return read_params(declared, self.table, self.source, model, layout)

    def tokenizer(self) -> Tokenizer | None:
        """None, and a word about it, where there is none.

        Raises DataError for one whose ids the model has no vectors for, or that cannot be read.
        """
        try:
            find_tokenizer(self.folder)
        except DataError as why:
            log.warning("no tokenizer comes along: %s", why)
            return None
        found = load_tokenizer(self.folder)
        if found.vocab_size > self.model.vocab_size:
            raise DataError(
                f"{self.folder}: its tokenizer has {found.vocab_size} ids, and the model vectors"
                f" for {self.model.vocab_size}; they are not of one another"
            )
        return found


def from_hf(folder: Path | str, layout: Layout | None = None) -> Any:
    """A model saved by transformers, under a layout (default: the first device).

    It carries `model.tokenizer`, None if there was none, `model.run`, its settings, and
    `model.origin`. Raises CheckpointError or DataError, before weights are read, where this is no
    whole model, or none that can be built here.
    """
    source = HfFolder(folder)
    layout = (layout or Layout.create(jax.devices()[:1])).fit(source.model)
    tokenizer = source.tokenizer()
    graphdef, _ = nnx.split(declare(source.model, layout), nnx.Param)
    model = nnx.merge(graphdef, source.params(source.model, layout))
    model.tokenizer, model.run = tokenizer, source.run
    model.origin = source.origin
    return model
