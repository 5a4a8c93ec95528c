"""Beam search: of each prompt the few likeliest beginnings of a text, longer by a token a turn.

Scores and when to stop are those of transformers' generate(num_beams=W), version 5.24:

score of a text    its nats / its tokens ** length_penalty; the end counts as one, the prompt not
a turn             of all beams' continuations the 2 W likeliest; those among the first W that end
                   are candidates for the W best texts, and the first W that do not end go on
the end            when W texts are there, and the likeliest beam, were it to end now without
                   another nat, would not be better than the worst of them; or at the last token,
                   where all that is there ends
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NEVER = -1e9  # nats of what is not there


class Search(NamedTuple):
    """Where a search is: of B prompts, W beams each, B W = R rows."""

    cache: Any
    memory: Any
    logits_RV: jax.Array  # of the next token
    at_R: jax.Array  # its position
    nats_BW: jax.Array  # of beams, the likeliest first
    out_BWT: jax.Array  # their tokens
    best_BW: jax.Array  # scores of texts that ended, the best first
    texts_BWT: jax.Array
    ended_BW: jax.Array  # whether there is such a text
    open_B: jax.Array  # whether a better one may come
    n: jax.Array  # tokens so far


@partial(jax.jit, static_argnames="beams")
def first_beams(turn: Any, beams: int) -> Search:
    """A search from an engine.Turn, whose rows that are done are not searched."""
    B, T = turn.out_BN.shape
    one_BW = jnp.zeros((B, beams), jnp.int32)
    cache, logits_RV, at_R = (
        chosen((turn.cache, turn.logits_BV[None], turn.at_B[None]), one_BW)
    )  # fmt: skip
    out_BWT = jnp.full((B, beams, T), -1, jnp.int32)
    never_BW = jnp.full((B, beams), NEVER, jnp.float32)
    return Search(
        cache, turn.memory, logits_RV[0], at_R[0], never_BW.at[:, 0].set(0.0), out_BWT, never_BW,
        out_BWT, one_BW > 0, ~turn.done_B, jnp.int32(0),
    )  # fmt: skip


@partial(jax.jit, donate_argnames="search")
def search_on(
    model: Any, search: Search, penalty: jax.Array, last: jax.Array, eod: jax.Array
) -> Search:
    """Turns until the end, or until texts have `last` tokens."""
    B, W, _ = search.out_BWT.shape
    blocks = model.apart() if type(search.cache) is tuple else None  # as the engine has them

    def add(s: Search) -> Search:
        V = s.logits_RV.shape[-1]
        nats_BWV = s.nats_BW[..., None] + jax.nn.log_softmax(s.logits_RV).reshape(B, W, V)
        nats_BC, index_BC = jax.lax.top_k(nats_BWV.reshape(B, W * V), 2 * W)
        beam_BC, token_BC = index_BC // V, index_BC % V
        out_BCT = at_each(s.out_BWT, beam_BC).at[:, :, s.n].set(token_BC)
        ends_BC = (token_BC == eod) | (s.n + 1 == last)

        nats_BW, on_BW = jax.lax.top_k(nats_BC + NEVER * ends_BC, W)
        new_BC = ends_BC & (jnp.arange(2 * W) < W)
        score_BC = nats_BC / (s.n + 1.0) ** penalty + NEVER * (~s.open_B[:, None]) + NEVER * ~new_BC
        best_BW, of_BW = jax.lax.top_k(jnp.concatenate([s.best_BW, score_BC], 1), W)
        texts_BWT = at_each(jnp.concatenate([s.texts_BWT, out_BCT], 1), of_BW)
        ended_BW = at_each(jnp.concatenate([s.ended_BW, new_BC], 1), of_BW)

        hoped_B1 = nats_BW[:, :1] / (s.n + 1.0) ** penalty
        worst_BW = jnp.where(ended_BW, best_BW[:, -1:], NEVER)
        open_B = s.open_B & (hoped_B1 > worst_BW).any(1)

        parents_BW, token_R1 = at_each(beam_BC, on_BW), at_each(token_BC, on_BW).reshape(-1, 1)
        h_R1D, cache = model.extend(
            token_R1, s.at_R[:, None], chosen(s.cache, parents_BW), blocks, s.memory
        )
        logits_RV, out_BWT = model.logits(h_R1D)[:, 0], at_each(out_BCT, on_BW)
        return Search(
            cache, s.memory, logits_RV, s.at_R + 1, nats_BW, out_BWT, best_BW, texts_BWT, ended_BW,
            open_B, s.n + 1,
        )  # fmt: skip

    return jax.lax.while_loop(lambda s: (s.n < last) & s.open_B.any(), add, search)


def at_each(x_BX: jax.Array, index_BY: jax.Array) -> jax.Array:
    """[B, Y, ...]: of x [B, X, ...] those at the indices of a prompt."""
    return jax.vmap(lambda x, index: x[index])(x_BX, index_BY)


def chosen(tree: Any, parents_BW: jax.Array) -> Any:
    """Arrays [L, B W', ...] as [L, B W, ...]: each row that of its parent among its prompt's W'."""
    B, W = parents_BW.shape

    def of(x: jax.Array) -> jax.Array:
        apart = x.reshape(x.shape[0], B, -1, *x.shape[2:])
        taken = jax.vmap(at_each, (0, None))(apart, parents_BW)
        return taken.reshape(x.shape[0], B * W, *x.shape[2:])

    return jax.tree.map(of, tree)
