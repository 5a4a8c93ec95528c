"""Steps that were not applied, because their loss or gradient was not finite."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlm_jax.errors import MlmJaxError


class BadSteps:
    """Counts them, and says when there were too many in a row.

    weights: names, in the order of a step's metric grad_norms.
    """

    def __init__(self, limit: int, weights: Sequence[str]):
        self.limit, self.weights = limit, weights
        self.in_a_row = 0
        self._last: tuple[int, Mapping[str, Any]] | None = None  # the step that was one too many

    def look(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        """What to write down of a bad step; None for a good one. Every step is shown once."""
        self.in_a_row = 0 if metrics["applied"] else self.in_a_row + 1
        if self.in_a_row == self.limit and not self._last:
            self._last = step, metrics
        if metrics["applied"]:
            return None
        facts = {key: metrics[key] for key in ("loss", "grad_norm")}
        return facts | {"weights": self.not_finite(metrics)}

    def check(self, saved: int) -> None:
        """Raises MlmJaxError once there were too many. saved: step of the newest checkpoint, or 0.

        To be called before every save: then no checkpoint is from after such a step, and the run,
        started again, comes to it with the same weights.
        """
        if self._last is None:
            return
        step, metrics = self._last
        n, weights = self.limit, self.not_finite(metrics)
        which = f"step {step} was" if n == 1 else f"{n} steps in a row, to step {step}, were"
        named = f"{', '.join(weights[:4])}{f' and {len(weights) - 4} more' * (len(weights) > 4)}"
        if len(weights) in (0, len(self.weights)):
            named = "all" if weights else "none by itself"
        newest = f"The newest checkpoint is of step {saved}" if saved else "Nothing was saved yet"
        raise MlmJaxError(
            f"{which} not applied, as loss or gradient is not finite: loss {metrics['loss']:g},"
            f" gradient norm {metrics['grad_norm']:g}, weights with such a gradient: {named}."
            f" {newest}. Lower optimizer.lr; look at the batch,"
            f" mlm_jax.data.pipeline.open_data(run).train.batch({step - 1}); or leave such steps"
            f" out with train.bad_steps_limit={10 * n}"
        )

    def not_finite(self, metrics: Mapping[str, Any]) -> list[str]:
        """Names of the weights whose gradient is not finite."""
        pairs = zip(self.weights, metrics["grad_norms"], strict=True)
        return [name for name, norm in pairs if not np.isfinite(norm)]
