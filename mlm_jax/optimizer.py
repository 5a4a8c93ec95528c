"""Update rules: optax's, chosen by name, as seen by one layer.

Blocks are stacked: [layer, embed, mlp] is a matrix a layer, not one array. Rules that go element by
element see no difference; those that look at a weight as a whole go by its dims without `layer`.
"""

from functools import partial
from itertools import dropwhile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mlm_jax.config import OptimizerConfig, RunConfig
from mlm_jax.layout import is_weight, path_name
from mlm_jax.schedules import make_decay_schedule, make_schedule

COPIES = ("layer", "expert")  # as first dims they count weights of one kind


def make_optimizer(run: RunConfig) -> optax.GradientTransformation:
    """Clip by global norm, update rule, decoupled decay (Loshchilov & Hutter 2019), rate, in order.

    The chain has these members under all settings, so that a run may go on with other ones.
    """
    o = run.optimizer
    return optax.chain(
        optax.clip_by_global_norm(o.clip) if o.clip else optax.identity(),
        RULES[o.name](o),
        optax.add_decayed_weights(make_decay_schedule(run), decayed),
        scale_by_group(o),
        optax.scale_by_learning_rate(make_schedule(run)),
    )


def updates_done(opt_state: Any) -> jax.Array:
    """int32 []: updates applied, which the schedule counts; bad steps are not among them."""
    return opt_state[-1].count


def decayed(params: Any) -> Any:
    """True for weights of two or more dims; biases and norms are not decayed, stacked or not."""
    return jax.tree.map(lambda w: w.replace(len(own_dims(w)) >= 2), params, is_leaf=is_weight)


def scale_by_group(o: OptimizerConfig) -> optax.GradientTransformation:
    """Learning rates of groups of weights, as multiples of the one rate."""
    scales = {
        "embedding": o.embedding_lr_scale, "head": o.head_lr_scale, "matrix": o.matrix_lr_scale,
    }  # fmt: skip

    def scaled(updates: Any, _: Any) -> Any:
        names = groups(updates)
        return jax.tree.map(
            lambda name, u: u.replace(u[...] * scales.get(name, 1.0)), names, updates
        )

    return optax.identity() if set(scales.values()) == {1.0} else optax.stateless(scaled)


def groups(params: Any) -> Any:
    """The group of each weight: embedding, head, matrix (of a block), or rest."""

    def group(path: tuple, w: Any) -> str:
        names = path_name(path).split(".")
        for name in ("embedding", "head"):
            if name in names:
                return name
        return "matrix" if "blocks" in names and len(own_dims(w)) == 2 else "rest"

    return jax.tree_util.tree_map_with_path(group, params, is_leaf=is_weight)


def own_dims(w: Any) -> tuple[str, ...]:
    """The dims of one of the weights that are stacked in w."""
    return tuple(dropwhile(COPIES.__contains__, w.get_metadata()["out_sharding"]))


def adamw(o: OptimizerConfig) -> optax.GradientTransformation:
    """Kingma & Ba 2015; the decay that makes it AdamW comes after every rule."""
    return optax.scale_by_adam(o.b1, o.b2, o.eps, mu_dtype=moment_dtype(o))


def lion(o: OptimizerConfig) -> optax.GradientTransformation:
    """Chen et al. 2023: the sign of a mean of gradients."""
    return optax.scale_by_lion(o.b1, o.b2, mu_dtype=moment_dtype(o))


def sgd(o: OptimizerConfig) -> optax.GradientTransformation:
    """Heavy-ball momentum: the sum of past gradients, each times momentum^age."""
    return optax.trace(o.momentum, accumulator_dtype=moment_dtype(o))


def muon(o: OptimizerConfig) -> optax.GradientTransformation:
    """Jordan et al. 2024: orthogonal updates for the matrices in blocks, Adam for the rest."""

    def matrix_dims(tree: Any) -> Any:  # weights are [.., in, out]; dims before these are a batch
        dims = MuonDimensionNumbers(-2, -1)
        return jax.tree.map(lambda w: w.replace(dims), tree, is_leaf=is_weight)

    def scale_by_shape(updates: Any, _: Any) -> Any:
        """So that a layer's output moves as much whatever its shape: sqrt(max(1, out / in))."""
        return jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)

    matrices = optax.chain(
        scale_by_muon(
            beta=o.momentum, eps=o.eps, mu_dtype=moment_dtype(o),
            weight_dimension_numbers=matrix_dims,
        ),
        optax.stateless(scale_by_shape),
    )  # fmt: skip

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda g: "matrix" if g == "matrix" else "rest", groups(params))

    return optax.partition({"matrix": matrices, "rest": adamw(o)}, labels)


def adafactor(_: OptimizerConfig) -> optax.GradientTransformation:
    """Shazeer & Stern 2018, without momentum: of the squared gradients of a matrix, only the means
    of rows and of columns are kept, where both are 128 or longer.

    Updates have an RMS of at most 1, times the RMS of their weight. All three go layer by layer.
    """
    tx = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )

    def axes_of(params: Any) -> tuple[Any, Any]:
        """Which axis counts layers, None where none does: of weights, and of the state."""
        none: Any = None
        axes = jax.tree.map(lambda w: 0 if is_stacked(w) else none, params, is_leaf=is_weight)
        factors = optax.FactoredState(count=none, v_row=axes, v_col=axes, v=axes)
        return axes, (factors, optax.EmptyState(), optax.EmptyState())

    def init(params: Any) -> Any:
        of_weights, of_state = axes_of(params)
        factors, *rest = over_layers(tx.init, (of_weights,), of_state)(bare(params))
        return named_factors(factors, params), *rest

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        of_weights, of_state = axes_of(params)
        apply = over_layers(tx.update, (of_weights, of_state, of_weights), (of_weights, of_state))
        new = apply(bare(updates), bare(state), bare(params))
        return like(updates, new[0]), like(state, new[1])

    return optax.GradientTransformation(init, update)


def named_factors(state: Any, params: Any) -> Any:
    """Adafactor's state with names: a factor lacks the dim that its mean is over."""

    def named(w: Any, x: jax.Array, rank: int) -> Any:
        dims, sizes = w.get_metadata()["out_sharding"], w.shape
        first = int(is_stacked(w))
        by_size = [first + i for i in np.argsort(sizes[first:])]  # as optax chooses
        gone = by_size[-rank] if len(by_size) >= rank else None
        kept = [i for i in range(len(sizes)) if i != gone]
        for part in (range(len(sizes)), kept):
            if x.shape == tuple(sizes[i] for i in part):
                return w.replace(x, out_sharding=tuple(dims[i] for i in part))
        return w.replace(x, out_sharding=(*dims[:first], None))  # [.., 1]: nothing is kept here

    def tree(moments: Any, rank: int) -> Any:
        return jax.tree.map(partial(named, rank=rank), params, moments, is_leaf=is_weight)

    return state._replace(
        v_row=tree(state.v_row, 1), v_col=tree(state.v_col, 2), v=tree(state.v, 1)
    )


def over_layers(f: Any, in_axes: Any, out_axes: Any) -> Any:
    """f layer by layer where axes say so; jax.vmap refuses axes that never do."""
    return jax.vmap(f, in_axes, out_axes) if jax.tree.leaves(in_axes) else f


def is_stacked(w: Any) -> bool:
    return w.get_metadata()["out_sharding"][0] == "layer"


def bare(tree: Any) -> Any:
    """The arrays of a tree of weights: their names are of all layers."""
    return jax.tree.map(lambda w: w[...] if is_weight(w) else w, tree, is_leaf=is_weight)


def like(tree: Any, arrays: Any) -> Any:
    """Arrays under the names that a tree has in their places."""
    return jax.tree.map(
        lambda w, x: w.replace(x) if is_weight(w) else x, tree, arrays, is_leaf=is_weight
    )


def moment_dtype(o: OptimizerConfig) -> Any:
    return jnp.bfloat16 if o.moment_dtype == "bfloat16" else None  # None: as the weights


RULES = {"adamw": adamw, "adafactor": adafactor, "lion": lion, "muon": muon, "sgd": sgd}
