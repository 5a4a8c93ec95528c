"""A converted model is the folder of a run that has not taken a step."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx

from mlm_jax.checkpoint.aside import built_aside, require_new
from mlm_jax.checkpoint.manager import Checkpoints, tree_bytes
from mlm_jax.checkpoint.workdir import write_run
from mlm_jax.config import CheckpointConfig, RunConfig
from mlm_jax.data.tokenizer import Tokenizer


def write_converted(
    workdir: Path, run: RunConfig, params: nnx.State, tokenizer: Tokenizer | None,
    origin: dict[str, Any],
) -> None:  # fmt: skip
    """workdir with config.json, tokenizer/ and checkpoints/0, which holds weights only.

    origin: what is known of the model where it came from, as config.json keeps it.

    Raises CheckpointError where workdir is not new or its disk too small; then, as where writing
    fails, nothing is left behind. For one process.
    """
    require_new(workdir, tree_bytes(params))
    with built_aside(workdir) as aside:
        with Checkpoints(aside, CheckpointConfig()) as checkpoints:
            checkpoints.save(0, {"params": jax.block_until_ready(params)})
        write_run(aside, run, tokenizer, {}, origin)
