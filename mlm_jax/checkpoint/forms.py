"""How weights lie elsewhere, and here: the arrays of one layer, turned over both ways.

Ours are [in, out]; torch's linear layers are [out, in]. Nothing here computes: numbers are moved,
so that there and back again is the same to the last bit.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from mlm_jax.config import ModelConfig

Arrays = list[np.ndarray]
Turn = Callable[[Sequence[np.ndarray], ModelConfig], Arrays]


class Form(NamedTuple):
    """to_ours(theirs, cfg), to_theirs(ours, cfg): lists of arrays in the order of a row's names."""

    to_ours: Turn
    to_theirs: Turn


def _transposed(arrays: Sequence[np.ndarray], _: ModelConfig) -> Arrays:
    return [a.T for a in arrays]


def _padded(theirs: Sequence[np.ndarray], cfg: ModelConfig) -> Arrays:
    """Rows for each token, with zeros beyond the vocabulary."""
    more = cfg.padded_vocab - cfg.vocab_size
    return [np.pad(a[: cfg.vocab_size], [(0, more), *[(0, 0)] * (a.ndim - 1)]) for a in theirs]


def _cut(ours: Sequence[np.ndarray], cfg: ModelConfig) -> Arrays:
    return [a[: cfg.vocab_size] for a in ours]


def _split_qkv(theirs: Sequence[np.ndarray], cfg: ModelConfig) -> Arrays:
    q, k = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    return np.split(theirs[0], [q, q + k], axis=-1)


def _joined(ours: Sequence[np.ndarray], _: ModelConfig) -> Arrays:
    return [np.concatenate(ours, axis=-1)]


def _ungrouped(theirs: Sequence[np.ndarray], cfg: ModelConfig) -> Arrays:
    """[out, ...] whose `out` is, group of heads by group, its queries, then its key and value."""
    out_last = theirs[0].T
    lead, K, H = out_last.shape[:-1], cfg.n_kv_heads, cfg.head_dim
    of_group = out_last.reshape(*lead, K, cfg.n_heads // K + 2, H)
    parts = of_group[..., :-2, :], of_group[..., -2, :], of_group[..., -1, :]
    return [part.reshape(*lead, -1) for part in parts]


def _grouped(ours: Sequence[np.ndarray], cfg: ModelConfig) -> Arrays:
    lead, K, H = ours[0].shape[:-1], cfg.n_kv_heads, cfg.head_dim
    of_group = np.concatenate([a.reshape(*lead, K, -1, H) for a in ours], axis=-2)
    return [of_group.reshape(*lead, -1).T]


def _halved(theirs: Sequence[np.ndarray], _: ModelConfig) -> Arrays:
    return np.split(theirs[0].T, 2, axis=-1)


def _in_one(ours: Sequence[np.ndarray], _: ModelConfig) -> Arrays:
    return [np.concatenate(ours, axis=-1).T]


AS_IS = Form(lambda theirs, _: list(theirs), lambda ours, _: list(ours))
TRANSPOSED = Form(_transposed, _transposed)
PER_TOKEN = Form(_padded, _cut)  # tables of embeddings, biases of logits
FUSED_QKV = Form(_split_qkv, _joined)  # [in, q k v]: GPT-2's Conv1D; and its bias
GROUPED_QKV = Form(_ungrouped, _grouped)  # GPT-NeoX (groups of one head), Megatron-LM
FUSED_GLU = Form(_halved, _in_one)  # [gate up, in]: Megatron-LM


def shapes_of_theirs(
    form: Form, ours: Sequence[tuple[int, ...]], cfg: ModelConfig
) -> list[tuple[int, ...]]:
    """The shapes of their arrays, for ours of these shapes (of one layer)."""
    blank = partial(np.broadcast_to, np.zeros((), np.uint8))  # takes no memory
    return [a.shape for a in form.to_theirs([blank(shape) for shape in ours], cfg)]
