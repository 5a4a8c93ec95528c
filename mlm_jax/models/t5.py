"""T5, an encoder that reads one text and a decoder that writes another (Raffel et al. 2020).

v1.0, v1.1 and mT5 differ by nouns of ModelConfig: activation relu or geglu, tied with
logit_scale = d_model ** -0.5 or with a head of its own.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.errors import LayoutError
from mlm_jax.layers.attention import CrossAttention, View
from mlm_jax.layers.cache import Cache
from mlm_jax.layers.dropout import dropout
from mlm_jax.layers.embedding import Embedding, Head
from mlm_jax.layers.norm import NORMS
from mlm_jax.layers.relative import cached_bias, distances, relative_bias
from mlm_jax.layers.watch import Seen, see
from mlm_jax.layers.weight import Normal, gathered, stacked, unstacked, weight
from mlm_jax.layout import Layout
from mlm_jax.models.block import Block, run_blocks


class Memory(NamedTuple):
    """What an encoder has read: its states [B, S, D], or each decoder layer's keys and values.

    segments int32 [B, S]: 1, or 0 for padding, which nothing sees.
    """

    states_BSD: jax.Array | None
    kept: Any  # a Cache, or one for each layer; None: of states
    segments_BS: jax.Array

    def split(self) -> "Memory":
        """With a cache for each layer."""
        return self._replace(kept=self.kept.split())


class Encoder(nnx.Module):
    """Blocks that see a whole text, and a last norm.

    distances  [buckets, N]  bucket, heads   what distances add to scores, in all layers
    """

    def __init__(self, cfg: ModelConfig, layout: Layout):
        self.blocks = stacked(with_scale_in_q(Block(cfg, layout, causal=False)), cfg.n_layers)
        self.norm = NORMS[cfg.norm](cfg, residual=cfg.d_model)
        self.distances = distances(cfg)


class DecoderBlock(Block):
    """x + attention(norm(x)), x + cross(norm(x)), x + mlp(norm(x)); three all-reduces under tp."""

    def __init__(self, cfg: ModelConfig, layout: Layout):
        super().__init__(cfg, layout)
        self.cross_norm = NORMS[cfg.norm](cfg, residual=cfg.d_model)
        self.cross = CrossAttention(cfg, layout)

    def between(
        self, x_BTD: jax.Array, view: View, layer: jax.Array, read: Any, add: Any
    ) -> jax.Array:
        memory = view.memory
        with jax.named_scope("cross"):
            kept = memory.kept
            k, v = self.cross.keys(memory.states_BSD) if kept is None else kept.read(layer)
            y_BTD = self.cross.look(read(x_BTD, self.cross_norm), k, v, memory.segments_BS)
            return add(x_BTD, y_BTD, "cross", (self.cross_norm, None))


class Decoder(nnx.Module):
    """Blocks that see what comes before, and what an encoder has read; and a last norm."""

    def __init__(self, cfg: ModelConfig, layout: Layout):
        cfg = dataclasses.replace(cfg, n_layers=cfg.n_decoder_layers)
        block = with_scale_in_q(DecoderBlock(cfg, layout))
        self.blocks = stacked(block, cfg.n_layers)
        self.norm = NORMS[cfg.norm](cfg, residual=cfg.d_model)
        self.distances = distances(cfg)


class T5(nnx.Module):
    """embedding of both, encoder, decoder, logits."""

    def __init__(self, cfg: ModelConfig, layout: Layout, remat: str = "none"):
        check_layout(cfg, layout)
        # Logits of a table that is scaled down begin as wide as those of another.
        std = cfg.init_std / cfg.logit_scale if cfg.tied else cfg.init_std
        self.embedding = Embedding(dataclasses.replace(cfg, init_std=std), layout)
        self.encoder, self.decoder = Encoder(cfg, layout), Decoder(cfg, layout)
        self.head = Head(cfg, layout)
        self.cfg, self.layout, self.remat = cfg, layout, remat

    def __call__(
        self, tokens_BS: jax.Array, targets_BT: jax.Array, mask: jax.Array | None = None,
        rngs: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """Logits float32 [B, T, V] of the token after each of targets, which the decoder reads.

        tokens int32 [B, S], of the encoder; mask bool or int [B, S]: false is padding; None: there
        is none. rngs: dropout keys [B]; None: no dropout.
        """
        h_BTD = self.hidden(tokens_BS, targets_BT, mask, rngs)
        return self.logits(h_BTD)[..., : self.cfg.vocab_size]

    def read(
        self, batch: Mapping[str, jax.Array], rngs: jax.Array | None, seen: Seen | None = None
    ) -> jax.Array:
        """`hidden` of a batch."""
        of = batch["tokens"], batch["decoder_tokens"], batch.get("segments")
        return self.hidden(*of, rngs, seen)

    def hidden(
        self, tokens_BS: jax.Array, targets_BT: jax.Array, mask: jax.Array | None = None,
        rngs: jax.Array | None = None, seen: Seen | None = None,
    ) -> jax.Array:  # fmt: skip
        """The decoder's last hidden states [B, T, D], normed: what `logits` takes."""
        cfg, T = self.cfg, targets_BT.shape[1]
        memory = self.encode(tokens_BS, mask, rngs, seen)
        bias_1NTS = self._bias(
            relative_bias(self.decoder.distances[...], cfg, T, T, bidirectional=False)
        )
        view = view_of(targets_BT)._replace(bias_BNTS=bias_1NTS, memory=memory)
        x_BTD = self._embed(targets_BT, view, rngs, cfg.n_layers)
        here: Seen | None = None if seen is None else {}
        x_BTD, _ = run_blocks(
            self.decoder.blocks, x_BTD, view, rngs, None, self.remat, here,
            first=cfg.n_layers,  # by which dropout draws
        )  # fmt: skip
        named(seen, "decoder", here)
        h_BTD = self._normed(self.decoder.norm, x_BTD)
        see(seen, "hidden", h_BTD)
        return h_BTD

    def encode(
        self, tokens_BS: jax.Array, mask: jax.Array | None = None, rngs: jax.Array | None = None,
        seen: Seen | None = None,
    ) -> Memory:  # fmt: skip
        """What the decoder reads of tokens [B, S]."""
        S = tokens_BS.shape[1]
        segments_BS = jnp.ones_like(tokens_BS) if mask is None else (mask > 0).astype(jnp.int32)
        bias_1NSS = self._bias(
            relative_bias(self.encoder.distances[...], self.cfg, S, S, bidirectional=True)
        )
        view = view_of(tokens_BS)._replace(segments_BT=segments_BS, bias_BNTS=bias_1NSS)
        x_BSD = self._embed(tokens_BS, view, rngs, 0)
        here: Seen | None = None if seen is None else {}
        x_BSD, _ = run_blocks(self.encoder.blocks, x_BSD, view, rngs, None, self.remat, here)
        named(seen, "encoder", here)
        h_BSD = gathered(self._normed(self.encoder.norm, x_BSD), self.layout)
        return Memory(h_BSD, None, segments_BS)

    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, padded vocab]; columns beyond vocab_size have probability 0."""
        with jax.named_scope("head"):
            return self.head(gathered(h_BTD, self.layout), self.head.weights(self.embedding))

    def transformed(self, h_BTD: jax.Array) -> jax.Array:
        """What the head multiplies, of last hidden states: these themselves."""
        return h_BTD

    def prefill(
        self, tokens_BP: jax.Array, lengths_B: jax.Array, start: jax.Array, slots: int
    ) -> tuple[jax.Array, Cache, jax.Array, Memory]:
        """What writing begins with: prompts [B, P] are read, and the decoder has read `start`.

        Hidden states [B, 1, D] of that; a cache of `slots`; the positions [B] of what comes next;
        each layer's keys and values of what was read.
        """
        B, P = tokens_BP.shape
        memory = self.encode(tokens_BP, jnp.arange(P) < lengths_B[:, None])
        kept = jax.lax.map(lambda block: block.cross.keys(memory.states_BSD), self.decoder.blocks)
        memory = Memory(None, Cache(*kept), memory.segments_BS)
        own = dataclasses.replace(self.cfg, n_layers=self.cfg.n_decoder_layers)
        cache, zeros_B = Cache.zeros(own, self.layout, B, slots), jnp.zeros(B, jnp.int32)
        start_B1 = jnp.broadcast_to(start, (B, 1)).astype(jnp.int32)
        h_B1D, cache = self.extend(start_B1, zeros_B[:, None], cache, None, memory)
        return h_B1D, cache, zeros_B + 1, memory

    def extend(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Any,
        apart: Sequence[DecoderBlock] | None, memory: Memory,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """Hidden states of more tokens of the decoder, which see cache and memory; and the cache.

        apart: the decoder's blocks as `apart` gives them; cache and memory.kept are split then.
        Of more rows than memory has, neighbours read the same one.
        """
        S = (cache if apart is None else cache[0]).k_LBKSH.shape[3]
        bias_BNTS = cached_bias(self.decoder.distances[...], self.cfg, positions_BT, S)
        bias_BNTS = self.layout.constrain(bias_BNTS, "batch", "heads", None, None)
        view = View(positions_BT, None, None, jnp.arange(tokens_BT.shape[1]), bias_BNTS=bias_BNTS)
        x_BTD = self._embed(tokens_BT, view, None, 0)
        if apart is None:
            view = view._replace(memory=memory)
            x_BTD, cache = run_blocks(self.decoder.blocks, x_BTD, view, None, cache, "none")
        else:
            written = []
            for n, (block, own, kept) in enumerate(zip(apart, cache, memory.kept, strict=True)):
                here = view._replace(memory=memory._replace(kept=kept))
                x_BTD, own = block(x_BTD, here, None, own, jnp.int32(n))
                written.append(own)
            cache = tuple(written)
        return self._normed(self.decoder.norm, x_BTD), cache

    def apart(self) -> list[DecoderBlock]:
        """The decoder's blocks, each with its own weights, for `extend`."""
        return unstacked(self.decoder.blocks)

    def _embed(
        self, tokens_BT: jax.Array, view: View, rngs: jax.Array | None, layer: int
    ) -> jax.Array:
        with jax.named_scope("embedding"):
            x_BTD = self.embedding(tokens_BT, view.positions_BT)
            x_BTD = self.layout.constrain(x_BTD, "batch", "residual_seq", None)
            return dropout(x_BTD, self.cfg.dropout, rngs, view.places_T, layer, "embedding")

    def _bias(self, bias_1NTS: jax.Array) -> jax.Array:
        return self.layout.constrain(bias_1NTS, None, "heads", None, None)

    def _normed(self, norm: Any, x_BTD: jax.Array) -> jax.Array:
        return self.layout.constrain(norm(x_BTD), "batch", "residual_seq", None)


def view_of(tokens_BT: jax.Array) -> View:
    places_T = jnp.arange(tokens_BT.shape[1])
    return View(jnp.broadcast_to(places_T, tokens_BT.shape), None, None, places_T)


def named(seen: Seen | None, stack: str, here: Seen | None) -> None:
    """Sizes of activations under the name of the stack that they are of."""
    if seen is not None and here is not None:
        seen.update({f"{stack}.{name}": x for name, x in here.items()})


def with_scale_in_q(block: Any) -> Any:
    """A block whose scores begin as with a scale of 1 / sqrt(head_dim): T5's own is 1."""
    for attention in (block.attention, getattr(block, "cross", None)):
        if attention is not None:
            cfg, scale = attention.cfg, attention.formula.scale
            std = Normal(cfg.init_std / math.sqrt(cfg.head_dim) / scale)
            attention.q = weight(cfg, std, embed=cfg.d_model, heads=cfg.n_heads * cfg.head_dim)
    return block


def check_layout(cfg: ModelConfig, layout: Layout) -> None:
    """Raises LayoutError for axes that do not know an encoder beside a decoder."""
    problems = [
        f"layout.{axis}={layout.mesh.shape[axis]}: no {what} of an encoder and a decoder is built;"
        f" try layout.{axis}=1, and layout.fsdp or layout.tp instead"
        for axis, what in (("pp", "pipeline"), ("cp", "split sequence"))
        if layout.mesh.shape[axis] > 1
    ]
    ways = layout.ways("residual_seq")
    if not problems and cfg.target_len % ways:
        problems.append(
            f"model.target_len={cfg.target_len} does not divide by layout.tp={ways}, which splits"
            f" the residual stream; try {-(-cfg.target_len // ways) * ways}"
        )
    if problems:
        raise LayoutError("; ".join(problems))
