"""Where a run's curves are shown besides its own report: TensorBoard, Weights & Biases."""

import importlib.util
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from mlm_jax.config import RunConfig
from mlm_jax.errors import ConfigError

log = logging.getLogger(__name__)


class Board(Protocol):
    """Shows the numbers of train and eval rows as curves."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def curves(row: Mapping[str, Any]) -> dict[str, float]:
    """Its numbers by the name of a curve: train/loss, or nested, train/grad_norms/blocks.mlp.up.

    What is told layer by layer, in lists, has no curves: it stands in metrics.jsonl.
    """
    values = {key: value for key, value in row.items() if key not in ("step", "time")}
    return dict(_numbers(values, row["kind"]))


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float):
            yield f"{prefix}/{key}", value


def open_tensorboard(folder: Path, resume_step: int) -> list[Board]:
    try:
        return [TensorBoard(folder, resume_step)]
    except ImportError:
        log.warning("no curves in %s: tensorboard is not installed", folder)
        return []


class TensorBoard:
    """TensorBoard event files, without TensorFlow.

    Not `tensorboard.summary.Writer`: its scalars are tensors, which `EventAccumulator.Scalars` does
    not list and does not forget after a restart.
    """

    def __init__(self, folder: Path, resume_step: int):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        proto: Any = event_pb2  # makes its classes when it is imported
        self._file, self._event = EventFileWriter(str(folder)), proto.Event
        restart = self._event(step=resume_step + 1, wall_time=time.time())
        restart.session_log.status = proto.SessionLog.START  # forget this step and what is after it
        self._file.add_event(restart)

    def write(self, row: Mapping[str, Any]) -> None:
        event = self._event(step=row["step"], wall_time=row["time"])
        for name, value in curves(row).items():
            event.summary.value.add(tag=name, simple_value=value)
        self._file.add_event(event)
        self._file.flush()  # or where TensorFlow is installed, a kill would cost 120 s of curves

    def close(self) -> None:
        self._file.close()


def open_wandb(run: RunConfig, workdir: Path) -> list[Board]:
    """The board that watch.wandb asks for, if it does. Raises ConfigError where there is none."""
    return [WeightsAndBiases(run, workdir)] if run.watch.wandb else []


def check_wandb(run: RunConfig) -> None:
    """Raises ConfigError where watch.wandb is set and the package is not installed."""
    if run.watch.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"watch.wandb={run.watch.wandb!r} needs a package that is not installed; run"
            " `pip install wandb`, or leave watch.wandb out: workdir/report.html has the curves"
        )


class WeightsAndBiases:
    """A run at wandb.ai; with WANDB_MODE=offline in workdir/wandb only, for `wandb sync` later.

    A workdir is one run there, however often it resumes. Steps that a resume undid are drawn twice:
    what was sent cannot be taken back.
    """

    def __init__(self, run: RunConfig, workdir: Path):
        import wandb  # pyright: ignore[reportMissingImports]

        known = workdir / "wandb" / "run-id"
        try:
            self._run = wandb.init(
                project=run.watch.wandb, name=workdir.resolve().name, dir=workdir,
                config=run.to_dict(), id=known.read_text() if known.exists() else None,
                resume="allow", settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except wandb.Error as why:
            raise ConfigError(
                f"watch.wandb={run.watch.wandb!r}: {why}; try `wandb login`, or WANDB_MODE=offline"
            ) from why
        known.parent.mkdir(exist_ok=True)
        known.write_text(self._run.id)
        for kind in ("train", "eval"):
            self._run.define_metric(f"{kind}/*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log({"step": row["step"], **curves(row)})

    def close(self) -> None:
        self._run.finish()
