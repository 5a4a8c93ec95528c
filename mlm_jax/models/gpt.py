"""The decoder-only transformer: GPT-2, Llama and what lies between, by the nouns of ModelConfig."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.layers.attention import View
from mlm_jax.layers.cache import Cache
from mlm_jax.layers.dropout import dropout
from mlm_jax.layers.embedding import Embedding, Head
from mlm_jax.layers.norm import NORMS
from mlm_jax.layers.order import in_order, out_of_order, places
from mlm_jax.layers.watch import Seen, see
from mlm_jax.layers.weight import gathered, stacked, unstacked
from mlm_jax.layout import Layout
from mlm_jax.models.block import Block, run_apart, run_blocks


class Gpt(nnx.Module):
    """embedding, blocks, a last norm, logits."""

    def __init__(self, cfg: ModelConfig, layout: Layout, remat: str = "none"):
        self.embedding = Embedding(cfg, layout)
        self.blocks = stacked(Block(cfg, layout), cfg.n_layers)
        last = cfg.norm_placement != "post"  # after which the residual stream is normed already
        self.norm = NORMS[cfg.norm](cfg, residual=cfg.d_model) if last else None
        self.head = Head(cfg, layout)
        self.cfg, self.layout, self.remat = cfg, layout, remat

    def __call__(
        self, tokens_BT: jax.Array, *, segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None, rngs: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """Logits float32 [B, T, V] of the token after each.

        tokens, segments, positions: int32 [B, T]. Tokens of different segments do not attend to
        each other; positions default to the place in the row. rngs: dropout keys [B], one a sample
        (layers.dropout.sample_keys); None: no dropout.
        """
        rows = tokens_BT, segments_BT, positions_BT
        tokens_BT, segments_BT, positions_BT = in_order(rows, self.layout)
        h_BTD = self.hidden(
            tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT, rngs=rngs
        )
        logits_BTV = self.logits(h_BTD)[..., : self.cfg.vocab_size]
        return out_of_order(logits_BTV, self.layout)

    def read(
        self, batch: Mapping[str, jax.Array], rngs: jax.Array | None, seen: Seen | None = None
    ) -> jax.Array:
        """`hidden` of a batch, whose rows are in the order of the layout."""
        return self.hidden(
            batch["tokens"], segments_BT=batch.get("segments"),
            positions_BT=batch.get("positions"), types_BT=batch.get("types"), rngs=rngs, seen=seen,
        )  # fmt: skip

    def hidden(
        self, tokens_BT: jax.Array, *, segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None, types_BT: jax.Array | None = None,
        rngs: jax.Array | None = None, seen: Seen | None = None,
    ) -> jax.Array:  # fmt: skip
        """Last hidden states [B, T, D] in model.dtype, normed: what `logits` takes.

        Rows are in the order of the layout, given and returned (layers.order): under cp
        a device holds two parts of each. Positions default to places in that order.
        seen: gets the sizes of activations (layers.watch).
        """
        places_T = places(self.layout, tokens_BT.shape[1])
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(places_T, tokens_BT.shape)
        view = View.of(self.cfg, positions_BT, segments_BT, places_T, types_BT)
        return self._hidden(tokens_BT, view, rngs, None, seen)[0]

    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, padded vocab]; columns beyond vocab_size have probability 0."""
        with jax.named_scope("head"):
            return self.head(gathered(h_BTD, self.layout), self.head.weights(self.embedding))

    def transformed(self, h_BTD: jax.Array) -> jax.Array:
        """What the head multiplies, of last hidden states: these themselves."""
        return h_BTD

    def prefill(
        self, tokens_BP: jax.Array, lengths_B: jax.Array, start: jax.Array, slots: int
    ) -> tuple[jax.Array, Cache, jax.Array, None]:
        """What writing begins with, after prompts [B, P] of these lengths, padded on the right.

        Hidden states [B, 1, D] of the last tokens; a cache of `slots`; the positions [B] of what
        comes next; what an encoder has read: nothing here, where `start` has no use either.
        """
        del start
        B, P = tokens_BP.shape
        cache = Cache.zeros(self.cfg, self.layout, B, slots)
        h_BPD, cache = self.extend(tokens_BP, jnp.broadcast_to(jnp.arange(P), (B, P)), cache)
        last_B1D = jnp.take_along_axis(h_BPD, (lengths_B - 1)[:, None, None], axis=1)
        return last_B1D, cache, lengths_B, None

    def extend(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache | tuple[Cache, ...],
        apart: Sequence[Block] | None = None, memory: None = None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """Hidden states of more tokens at these positions, which see the cache; and the cache.

        apart: the blocks as `apart` gives them, each with a cache of its own.
        """
        view = View.of(self.cfg, positions_BT)
        return self._hidden(tokens_BT, view, None, cache, apart=apart)

    def apart(self) -> list[Block]:
        """The blocks, each with its own weights, for `extend`."""
        return unstacked(self.blocks)

    def _hidden(
        self, tokens_BT: jax.Array, view: View, rngs: jax.Array | None, cache: Any,
        seen: Seen | None = None, apart: Sequence[Block] | None = None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        x_BTD = self.embed(tokens_BT, view, rngs)
        if apart is None:
            x_BTD, cache = run_blocks(self.blocks, x_BTD, view, rngs, cache, self.remat, seen)
        else:
            x_BTD, cache = run_apart(apart, x_BTD, view, cache)
        h_BTD = self.normed(x_BTD)
        see(seen, "hidden", h_BTD)
        return h_BTD, cache

    def embed(self, tokens_BT: jax.Array, view: View, rngs: jax.Array | None) -> jax.Array:
        """What the first block takes, [B, T, D]."""
        with jax.named_scope("embedding"):
            x_BTD = self.embedding(tokens_BT, view.positions_BT, view.types_BT)
            x_BTD = self.layout.constrain(x_BTD, "batch", "residual_seq", None)
            return dropout(x_BTD, self.cfg.dropout, rngs, view.places_T, 0, "embedding")

    def normed(self, x_BTD: jax.Array) -> jax.Array:
        """What `logits` takes, of what the last block gives."""
        h_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        return self.layout.constrain(h_BTD, "batch", "residual_seq", None)
