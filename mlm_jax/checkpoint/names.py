"""Names of weights here and elsewhere: a two-way table for each make of model.

A table says all that a make calls by a name, with biases or without: of its rows those count whose
weights a model has (`fitting`). The nouns of a ModelConfig decide that, so that Llama's table
serves Mistral, Qwen and Gemma too.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from mlm_jax.checkpoint.forms import (
    AS_IS,
    FUSED_GLU,
    FUSED_QKV,
    GROUPED_QKV,
    PER_TOKEN,
    TRANSPOSED,
    Form,
)
from mlm_jax.errors import CheckpointError


class Row(NamedTuple):
    """Weights here and tensors there that say the same.

    ours      paths of weights: blocks.attention.q, of stacked layers all at once
    theirs    names of tensors; {} is the number of the layer
    form      turns the arrays of one layer over, in the order of the names
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form = AS_IS

    def of_layer(self, number: int) -> list[str]:
        """The names there of one layer."""
        return [name.format(number) for name in self.theirs]

    @property
    def layered(self) -> bool:
        return "{}" in self.theirs[0]


Table = tuple[Row, ...]


def row(ours: str, theirs: str, form: Form = AS_IS) -> Row:
    return Row((ours,), (theirs,), form)


def linear(ours: str, theirs: str, form: Form = TRANSPOSED) -> Table:
    return row(ours, f"{theirs}.weight", form), row(f"{ours}_bias", f"{theirs}.bias")


def norm(ours: str, theirs: str) -> Table:
    return row(f"{ours}.scale", f"{theirs}.weight"), row(f"{ours}.bias", f"{theirs}.bias")


def qkv(block: str, theirs: str, form: Form) -> Table:
    """Queries, keys and values in one matrix."""
    names = tuple(f"{block}.attention.{part}" for part in "qkv")
    biases = tuple(f"{name}_bias" for name in names)
    return Row(names, (f"{theirs}.weight",), form), Row(biases, (f"{theirs}.bias",), form)


def fitting(table: Sequence[Row], weights: Collection[str]) -> list[Row]:
    """The rows for a model that has these weights; of two for one weight the first that fits.

    Raises CheckpointError for weights that the table has no name for.
    """
    left, rows = set(weights), []
    for candidate in table:
        if left.issuperset(candidate.ours):
            left.difference_update(candidate.ours)
            rows.append(candidate)
    if left:
        raise CheckpointError(f"this make of model has no {', '.join(sorted(left))}")
    return rows


GPT2 = (
    row("embedding.tokens", "transformer.wte.weight", PER_TOKEN),
    row("embedding.positions", "transformer.wpe.weight"),
    *norm("blocks.attention_norm", "transformer.h.{}.ln_1"),
    *qkv("blocks", "transformer.h.{}.attn.c_attn", FUSED_QKV),
    *linear("blocks.attention.o", "transformer.h.{}.attn.c_proj", AS_IS),  # Conv1D: [in, out]
    *norm("blocks.mlp_norm", "transformer.h.{}.ln_2"),
    *linear("blocks.mlp.up", "transformer.h.{}.mlp.c_fc", AS_IS),
    *linear("blocks.mlp.down", "transformer.h.{}.mlp.c_proj", AS_IS),
    *norm("norm", "transformer.ln_f"),
    row("head.weight", "lm_head.weight", PER_TOKEN),
)


def _llama(*norms: Row) -> Table:
    attention, mlp = "model.layers.{}.self_attn", "model.layers.{}.mlp"
    return (
        row("embedding.tokens", "model.embed_tokens.weight", PER_TOKEN),
        *norms,
        *linear("blocks.attention.q", f"{attention}.q_proj"),
        *linear("blocks.attention.k", f"{attention}.k_proj"),
        *linear("blocks.attention.v", f"{attention}.v_proj"),
        *linear("blocks.attention.o", f"{attention}.o_proj"),
        *norm("blocks.attention.q_norm", f"{attention}.q_norm"),
        *norm("blocks.attention.k_norm", f"{attention}.k_norm"),
        *linear("blocks.mlp.gate", f"{mlp}.gate_proj"),
        *linear("blocks.mlp.up", f"{mlp}.up_proj"),
        *linear("blocks.mlp.down", f"{mlp}.down_proj"),
        *norm("norm", "model.norm"),
        row("head.weight", "lm_head.weight", PER_TOKEN),
    )


LLAMA = _llama(
    *norm("blocks.attention_norm", "model.layers.{}.input_layernorm"),
    *norm("blocks.mlp_norm", "model.layers.{}.post_attention_layernorm"),
)
GEMMA2 = _llama(  # norms before and after both halves of a block
    *norm("blocks.attention_norm", "model.layers.{}.input_layernorm"),
    *norm("blocks.attention_out_norm", "model.layers.{}.post_attention_layernorm"),
    *norm("blocks.mlp_norm", "model.layers.{}.pre_feedforward_layernorm"),
    *norm("blocks.mlp_out_norm", "model.layers.{}.post_feedforward_layernorm"),
)
GPT_NEOX = (
    row("embedding.tokens", "gpt_neox.embed_in.weight", PER_TOKEN),
    *norm("blocks.attention_norm", "gpt_neox.layers.{}.input_layernorm"),
    *qkv("blocks", "gpt_neox.layers.{}.attention.query_key_value", GROUPED_QKV),
    *linear("blocks.attention.o", "gpt_neox.layers.{}.attention.dense"),
    *norm("blocks.mlp_norm", "gpt_neox.layers.{}.post_attention_layernorm"),
    *linear("blocks.mlp.up", "gpt_neox.layers.{}.mlp.dense_h_to_4h"),
    *linear("blocks.mlp.down", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    *norm("norm", "gpt_neox.final_layer_norm"),
    row("head.weight", "embed_out.weight", PER_TOKEN),
)
BERT = (
    row("embedding.tokens", "bert.embeddings.word_embeddings.weight", PER_TOKEN),
    row("embedding.positions", "bert.embeddings.position_embeddings.weight"),
    row("embedding.types", "bert.embeddings.token_type_embeddings.weight"),
    *norm("embedding.norm", "bert.embeddings.LayerNorm"),
    *linear("blocks.attention.q", "bert.encoder.layer.{}.attention.self.query"),
    *linear("blocks.attention.k", "bert.encoder.layer.{}.attention.self.key"),
    *linear("blocks.attention.v", "bert.encoder.layer.{}.attention.self.value"),
    *linear("blocks.attention.o", "bert.encoder.layer.{}.attention.output.dense"),
    *norm("blocks.attention_norm", "bert.encoder.layer.{}.attention.output.LayerNorm"),
    *linear("blocks.mlp.up", "bert.encoder.layer.{}.intermediate.dense"),
    *linear("blocks.mlp.down", "bert.encoder.layer.{}.output.dense"),
    *norm("blocks.mlp_norm", "bert.encoder.layer.{}.output.LayerNorm"),
    *linear("transform.dense", "cls.predictions.transform.dense"),
    *norm("transform.norm", "cls.predictions.transform.LayerNorm"),
    row("head.bias", "cls.predictions.bias", PER_TOKEN),
    *linear("pooler.dense", "bert.pooler.dense"),
    *linear("order.dense", "cls.seq_relationship"),
)


def _t5_stack(stack: str, *attentions: tuple[str, str]) -> Table:
    """attentions: what each is called here and there; the feed-forward is behind them."""
    rows: list[Row] = []
    for number, (ours, theirs) in enumerate(attentions):
        layer = f"{stack}.block.{{}}.layer.{number}"
        rows += norm(f"{stack}.blocks.{ours}_norm", f"{layer}.layer_norm")
        for part in "qkvo":
            rows += linear(f"{stack}.blocks.{ours}.{part}", f"{layer}.{theirs}.{part}")
    layer, mlp = f"{stack}.block.{{}}.layer.{len(attentions)}", f"{stack}.blocks.mlp"
    gate, up = (f"{layer}.DenseReluDense.{wi}.weight" for wi in ("wi_0", "wi_1"))
    distances = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        *rows,
        *norm(f"{stack}.blocks.mlp_norm", f"{layer}.layer_norm"),
        Row((f"{mlp}.gate", f"{mlp}.up"), (gate, up), TRANSPOSED),
        *linear(f"{mlp}.up", f"{layer}.DenseReluDense.wi"),
        *linear(f"{mlp}.down", f"{layer}.DenseReluDense.wo"),
        *norm(f"{stack}.norm", f"{stack}.final_layer_norm"),
        row(f"{stack}.distances", distances),
    )


T5 = (
    row("embedding.tokens", "shared.weight", PER_TOKEN),
    *_t5_stack("encoder", ("attention", "SelfAttention")),
    *_t5_stack("decoder", ("attention", "SelfAttention"), ("cross", "EncDecAttention")),
    row("head.weight", "lm_head.weight", PER_TOKEN),
)


def _megatron() -> Table:
    """As TransformerEngine's layers are called, whose norms are part of the matrix behind them."""
    attention, mlp = "decoder.layers.{}.self_attention", "decoder.layers.{}.mlp"
    qkv_norm, mlp_norm = f"{attention}.linear_qkv.layer_norm", f"{mlp}.linear_fc1.layer_norm"
    halves, biases = (tuple(f"blocks.mlp.{w}{b}" for w in ("gate", "up")) for b in ("", "_bias"))
    return (
        row("embedding.tokens", "embedding.word_embeddings.weight", PER_TOKEN),
        row("embedding.positions", "embedding.position_embeddings.weight"),
        row("blocks.attention_norm.scale", f"{qkv_norm}_weight"),
        row("blocks.attention_norm.bias", f"{qkv_norm}_bias"),
        *qkv("blocks", f"{attention}.linear_qkv", GROUPED_QKV),
        *linear("blocks.attention.o", f"{attention}.linear_proj"),
        *norm("blocks.attention.q_norm", f"{attention}.q_layernorm"),
        *norm("blocks.attention.k_norm", f"{attention}.k_layernorm"),
        row("blocks.mlp_norm.scale", f"{mlp_norm}_weight"),
        row("blocks.mlp_norm.bias", f"{mlp_norm}_bias"),
        Row(halves, (f"{mlp}.linear_fc1.weight",), FUSED_GLU),
        Row(biases, (f"{mlp}.linear_fc1.bias",), FUSED_GLU),
        *linear("blocks.mlp.up", f"{mlp}.linear_fc1"),
        *linear("blocks.mlp.down", f"{mlp}.linear_fc2"),
        *norm("norm", "decoder.final_layernorm"),
        row("head.weight", "output_layer.weight", PER_TOKEN),
    )


MEGATRON = _megatron()
