"""Host batches to the devices of a layout: each process reads the rows its own devices hold."""

from collections.abc import Generator
from contextlib import closing

import jax
import numpy as np

from mlm_jax.data.pipeline import Batches, HostBatch
from mlm_jax.layout import Layout


class Feed:
    """The batches of a split as global arrays, whose processes have read no more than their own."""

    def __init__(self, batches: Batches, layout: Layout):
        self.batches, self.layout = batches, layout
        self.own = {size: own_rows(layout, size) for size in batches.sizes.sizes()}

    def batch(self, k: int, *, once: bool = False) -> dict[str, jax.Array]:
        size = self.batches.sizes.size(k)
        rows = self.batches.batch(k, self.own[size], once=once)
        return place(rows, self.layout, size)

    def ahead(self, start: int, stop: int) -> Generator[dict[str, jax.Array], None, None]:
        """Batches start to stop, read ahead."""
        with closing(self.batches.prefetch(start, stop, self.own)) as read:
            for k in range(start, stop):
                yield place(next(read), self.layout, self.batches.sizes.size(k))


def own_rows(layout: Layout, size: int) -> np.ndarray:
    """The rows of a batch of this size that the devices of this process hold, ascending."""
    held = layout.sharding("batch").addressable_devices_indices_map((size,)).values()
    return np.unique([np.arange(size)[index] for index in held])


def place(batch: HostBatch, layout: Layout, size: int) -> dict[str, jax.Array]:
    """Global arrays of `size` rows, from this process's own rows of them, or from all."""
    return {
        name: jax.make_array_from_process_local_data(
            layout.sharding("batch", *(None,) * (x.ndim - 1)), x, (size, *x.shape[1:])
        )
        for name, x in batch.items()
    }
