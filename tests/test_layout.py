import dataclasses
import math
import re
import time

import hypothesis
import jax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from mlm_jax.config import LayoutConfig
from mlm_jax.door import load_config
from mlm_jax.errors import LayoutError
from mlm_jax.layout import Layout, P
from mlm_jax.mesh import MESH_AXES, PRESETS, resolve
from mlm_jax.models import build, declare
from mlm_jax.step import make_steps
from tests.conftest import LAYOUTS, named, tiny_layout, tiny_run


def explained(layout, cfg):
    return {r["weight"]: r for r in layout.explain(nnx.state(declare(cfg, layout), nnx.Param))}


def above_one(sizes):
    return {axis: n for axis, n in sizes.items() if n > 1}


@pytest.mark.parametrize(
    ("preset", "on_8"),
    [
        (None, {"dp": 8}),
        ("single", {}),
        ("dp", {"dp": 8}),
        ("fsdp", {"fsdp": 8}),
        ("tp", {"tp": 8}),
        ("tp_sp", {"tp": 8}),
        ("fsdp_tp", {"fsdp": 4, "tp": 2}),
        ("zero1", {"dp": 8}),
        ("zero2", {"dp": 8}),
        ("zero3", {"fsdp": 8}),
        ("hybrid", {"fsdp": 8}),  # a single node
    ],
)
def test_presets(preset, on_8):
    assert preset is None or preset in PRESETS
    run = tiny_run(model={"n_heads": 8}, layout={"preset": preset})
    layout = Layout.from_config(run, 8)
    assert tuple(layout.mesh.shape) == MESH_AXES
    assert above_one(layout.mesh.shape) == on_8
    assert layout.axes("residual_seq") == (("tp",) if preset == "tp_sp" else ())
    assert layout.zero == {"zero1": 1, "zero2": 2}.get(preset, 0)
    if preset == "fsdp_tp":
        with pytest.raises(LayoutError, match=r"tp=2 takes 2 devices .* the 1 there are"):
            Layout.from_config(run, 1)
    else:  # sequence parallelism is off too where there is nothing to split
        assert Layout.from_config(run, 1).mesh.size == 1
        assert Layout.from_config(run, 1).axes("residual_seq") == ()
        assert Layout.from_config(run, 1).zero == 0


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"preset": "dp", "tp": 2}, {"dp": 4, "tp": 2}),
        ({"preset": "fsdp", "dp": 2}, {"dp": 2, "fsdp": 4}),
        ({"preset": "tp", "fsdp": 2}, {"fsdp": 2, "tp": 4}),
        ({"preset": "tp", "tp": 2}, {"dp": 4, "tp": 2}),  # what is left over goes to dp
        ({"preset": "fsdp_tp", "tp": 4}, {"fsdp": 2, "tp": 4}),
        ({"preset": "fsdp_tp", "fsdp": 2}, {"dp": 2, "fsdp": 2, "tp": 2}),
        ({"preset": "tp", "fsdp": -1}, {"fsdp": 8}),  # the preset's own -1 gives way
        ({"tp": 2}, {"dp": 4, "tp": 2}),
        ({"fsdp": 2, "tp": -1}, {"fsdp": 2, "tp": 4}),
        ({"dp": 2, "fsdp": 2, "tp": 2}, {"dp": 2, "fsdp": 2, "tp": 2}),
    ],
    ids=str,
)
def test_an_explicit_size_wins_and_one_axis_takes_the_rest(settings, sizes):
    resolved = resolve(LayoutConfig(**settings), 8)
    assert above_one({axis: resolved[axis] for axis in MESH_AXES}) == sizes


def test_sequence_parallelism_follows_the_preset_unless_set():
    assert resolve(LayoutConfig(preset="tp_sp"), 8)["sequence_parallel"]
    unset = LayoutConfig(preset="tp_sp", sequence_parallel=False)
    assert not resolve(unset, 8)["sequence_parallel"]
    assert resolve(LayoutConfig(tp=4, sequence_parallel=True), 8)["sequence_parallel"]


def test_single_takes_one_device_of_many():
    layout = Layout.from_config(tiny_run(layout={"preset": "single"}))
    assert layout.mesh.devices.tolist() == [[[[[[jax.devices()[0]]]]]]]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dp": -1, "tp": -1}, ["layout.dp=-1 and layout.tp=-1", "at most one"]),
        ({"dp": -1, "tp": 3}, ["tp=3 takes 3 devices", "8 there are", "product divides 8"]),
        ({"dp": 2, "tp": 2}, ["dp=2 tp=2 takes 4 of 8 devices", "try dp=4"]),
        ({"dp": 3, "tp": 3}, ["dp=3 tp=3 takes 9 of 8 devices"]),
        ({"sequence_parallel": True}, ["layout.sequence_parallel=True", "layout.tp=1", "leave it"]),
        ({"zero": 1, "fsdp": 8}, ["layout.zero=1 does nothing with layout.dp=1; leave it out"]),
        ({"ep": 2}, ["layout.ep=2", "not built yet", "try ep=1"]),
        (
            {"ep": 2, "cp_attention": "ring"},
            ["layout.ep=2", "expert", "layout.cp_attention", "cp=1"],
        ),
        ({"rules": {"mpl": ("tp",)}}, ["no array has a dim 'mpl'", "try mlp"]),
        ({"rules": {"mlp": ("tpp",)}}, ["mlp='tpp' is no mesh axis", "or tp"]),
        ({"weights": {"up": ("embd", "mlp")}}, ["'embd' has no rule", "embed"]),
        ({"weights": {"up(": ("embed", "mlp")}}, ["'up(' is no regular expression"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings, says):
    with pytest.raises(LayoutError) as refused:
        Layout.from_config(tiny_run(layout=settings), 8)
    assert all(words in str(refused.value) for words in says), refused.value


CLASHES = [  # sizes, rules set by hand, what is said of which row
    ({"dp": 4, "tp": 2}, {"heads": ("tp", "dp")},
     ["heads=tp,dp shares activations with batch=dp,fsdp,ep, and an axis", "try heads=tp"]),
    ({"dp": 4, "tp": 2}, {"batch": ("dp", "tp")},
     ["batch=dp,tp shares activations with heads=tp and kv_heads=tp and mlp=tp and vocab=tp,",
      "try batch=dp"]),
    ({"dp": 4, "tp": 2}, {"mlp": ("tp", "tp")}, ["mlp=tp,tp names tp twice; try mlp=tp"]),
    ({"dp": 4, "cp": 2}, {"residual_seq": ()},
     ["residual_seq= does not begin with seq=cp", "try residual_seq=cp"]),
    ({"pp": 2, "dp": 4}, {"layer": ()}, ["layer= does not go with layout.pp=2", "try layer=pp"]),
    ({"pp": 2, "fsdp": 4}, {"layer": ("pp", "fsdp")}, ["layer=pp,fsdp does", "try layer=pp"]),
    ({"pp": 2, "fsdp": 4}, {"mlp": ("tp", "pp")}, ["mlp=tp,pp does not go", "try mlp=tp"]),
    ({"pp": 2, "dp": 4}, {"embed": ("fsdp", "dp")}, ["embed=fsdp,dp does", "try embed=fsdp"]),
    ({"pp": 2, "dp": 4}, {"batch": ("fsdp",)}, ["batch=fsdp does not", "try batch=dp,fsdp"]),
    ({"pp": 2, "dp": 2, "cp": 2}, {"seq": (), "residual_seq": ()},
     ["seq= does not go with layout.pp=2", "try seq=cp", "try residual_seq=cp"]),
    ({"pp": 4, "cp": 2}, {"seq": (), "residual_seq": (), "batch": ("dp", "cp")},
     ["batch=dp,cp does not go with layout.pp=4", "try batch=dp", "try seq=cp"]),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "rules", "says"), CLASHES, ids=lambda x: str(x)[:40])
def test_rules_that_cannot_be_together_are_refused_with_rows_that_can(sizes, rules, says):
    with pytest.raises(LayoutError) as refused:
        Layout.create(8, **sizes, rules=rules)
    lines = str(refused.value).splitlines()[1:]
    assert all(words in str(refused.value) for words in says), refused.value
    tried = dict(line.rpartition("; try ")[2].split("=") for line in lines)
    assert tried.keys() <= rules.keys()
    rows = {dim: tuple(filter(None, axes.split(","))) for dim, axes in tried.items()}
    Layout.create(8, **sizes, rules=rules | rows)  # all that is said at once works


@pytest.mark.parametrize(
    ("sizes", "rules"),
    [
        ({"pp": 2, "tp": 4}, {"vocab_in": ("tp", "fsdp", "pp"), "position": ("fsdp", "pp")}),
        ({"pp": 2, "cp": 4}, {"embed": ("fsdp", "cp")}),
        ({"pp": 2, "dp": 2, "fsdp": 2}, {"batch": ("fsdp", "dp")}),
        ({"pp": 1, "dp": 8}, {"batch": (), "mlp": ("tp", "dp")}),
        ({"dp": 8}, {"seq": (), "heads": ("tp", "pp"), "layer": ("fsdp",)}),
    ],
    ids=str,
)
def test_other_rules_by_hand_are_taken(sizes, rules):
    layout = Layout.create(8, **sizes, rules=rules)
    assert {dim: layout.rules[dim] for dim in rules} == rules


def test_only_what_pp_splits_into_chunks_and_cp_into_parts_has_to_divide_by_them():
    by_hand = {"vocab_in": ("tp", "fsdp", "pp")}
    run = tiny_run(
        model={"n_layers": 6, "vocab_size": 128},
        train={"accumulate": 4},
        layout={"pp": 2, "chunks": 3, "rules": by_hand},
    )
    assert Layout.from_config(run, 2).factors("vocab_in") == [("layout.pp", 2)]
    rows = Layout.create(2, cp=2, rules={"batch": ("cp",), "seq": (), "residual_seq": ()})
    assert rows.factors("batch") == [("layout.cp", 2)]
    short = tiny_run(model={"seq_len": 12}, layout={"cp": 2, "tp": 2, "sequence_parallel": True})
    assert Layout.from_config(short, 4).ways("residual_seq") == 4


def test_every_misfit_is_in_one_message():
    run = tiny_run(
        model={"n_heads": 6, "n_kv_heads": 3, "d_model": 66, "d_mlp": 99, "seq_len": 31},
        train={"global_batch_size": 12, "accumulate": 2},
        layout={"fsdp": 2, "tp": 4, "sequence_parallel": True},
    )
    lines = refused(run, 16)  # dp 2
    assert lines[0] == "layout dp=2 fsdp=2 tp=4 does not fit this run:"
    settings = [line.partition(" does not divide by ")[0].strip() for line in lines[1:]]
    assert settings == [
        "model.n_heads = 6", "model.n_kv_heads = 3", "model.n_heads * model.head_dim = 66",
        "model.d_mlp = 99", "model.seq_len = 31", "train.global_batch_size / train.accumulate = 6",
    ]  # fmt: skip
    assert all("; try " in line for line in lines[1:])


MISFITS = [  # settings, devices, what is said: setting, size, and values to try
    ({"model": {"n_heads": 6, "d_model": 96}, "layout": {"tp": 4}}, 4,
     "model.n_heads = 6 does not divide by layout.tp = 4; try n_heads 4 or 8, or tp 2 (dp 2)"),
    ({"model": {"n_heads": 12, "n_kv_heads": 3, "d_model": 96}, "layout": {"tp": 2}}, 2,
     "model.n_kv_heads = 3 does not divide by layout.tp = 2; try n_kv_heads 2 or 4"),
    ({"model": {"n_layers": 6}, "layout": {"pp": 4}, "train": {"accumulate": 4}}, 8,
     "model.n_layers = 6 does not divide by layout.pp = 4; try n_layers 4 or 8, or pp 2 (dp 4)"),
    ({"model": {"n_layers": 6}, "layout": {"pp": 2, "chunks": 2}, "train": {"accumulate": 4}}, 8,
     "model.n_layers = 6 does not divide by layout.pp * layout.chunks = 4; try n_layers 4 or 8, or"
     " chunks 1 or 3"),
    ({"model": {"seq_len": 36}, "layout": {"cp": 4}}, 4,
     "model.seq_len = 36 does not divide by layout.cp * 2 of zigzag = 8; try seq_len 32 or 40, or"
     " cp 2 (dp 2)"),
    ({"model": {"vocab_size": 500, "d_model": 48, "n_heads": 3, "d_mlp": 192},
      "layout": {"tp": 3}}, 3,
     "model.vocab_size (padded) = 512 does not divide by layout.tp = 3; try vocab_size 384 or 768"),
    ({"layout": {"dp": 2, "fsdp": 4}, "train": {"global_batch_size": 16, "accumulate": 4}}, 8,
     "train.global_batch_size / train.accumulate = 4 does not divide by layout.dp * layout.fsdp ="
     " 8; try accumulate 2 or 1, or global_batch_size 32 or 64"),
    ({"model": {"n_layers": 4}, "layout": {"pp": 4}, "train": {"accumulate": 2}}, 4,
     "train.accumulate = 2 does not fill the stages: a pipeline needs layout.pp = 4 at least; try"
     " accumulate 4 or 8, or pp 2 (dp 2)"),
    ({"model": {"n_layers": 8}, "layout": {"pp": 4, "chunks": 2},
      "train": {"global_batch_size": 36, "accumulate": 6}}, 4,
     "train.accumulate = 6 does not fill the stages: a pipeline needs a multiple of layout.pp = 4;"
     " try accumulate 4 or 12, or pp 2 (dp 2), or chunks 1"),
    ({"model": {"n_layers": 4}, "layout": {"pp": 4},
      "train": {"global_batch_size": 3, "accumulate": 3}}, 4,
     "train.accumulate = 3 does not fill the stages: a pipeline needs layout.pp = 4 at least; try"
     " accumulate 4 (global_batch_size 4) or 5 (global_batch_size 5)"),
    ({"model": {"n_layers": 4}, "layout": {"pp": 4}, "train": {
        "accumulate": 4, "batch_schedule": "0:8 1K:32", "steps": 100}}, 8,
     "train.batch_schedule = '0:8 1K:32' has batches of 8 sequences, and a pipeline needs"
     " layout.pp = 4 microbatches of 8 = 32 at least; try accumulate 16, or such batches"),
    ({"layout": {"dp": 8}, "train": {"global_batch_size": 97}}, 8,
     "train.global_batch_size / train.accumulate = 97 does not divide by layout.dp = 8; try"
     " global_batch_size 96 or 104"),
    ({"layout": {"dp": 8}, "train": {"batch_schedule": "0:4 1K:32", "steps": 20}}, 8,
     "train.batch_schedule = '0:4 1K:32' has batches of 4 sequences, which do not divide by"
     " layout.dp = 8; try such batches"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "devices", "says"), MISFITS, ids=lambda x: str(x)[:40])
def test_what_does_not_divide_is_refused_with_values_that_work(settings, devices, says):
    lines = refused(tiny_run(**settings), devices)
    assert "  " + says in lines
    for line in lines[1:]:
        assert_mends(settings, devices, line)


def refused(run, devices):
    with pytest.raises(LayoutError) as why:
        Layout.from_config(run, devices)
    return str(why.value).splitlines()


def hints(line):
    """[{setting: value}] of 'setting = 6 does not ..; try n_heads 4 or 8, or tp 2 (dp 4) or 1'.

    Of a schedule, {"batch_schedule": the least size}.
    """
    found = []
    complaint, _, tries = line.partition("; try ")
    for group in re.split(r", or (?=[a-z])", tries):
        if group == "such batches":
            found.append({"batch_schedule": int(re.search(r"= (\d+)( at least)?$", complaint)[1])})
            continue
        assert re.fullmatch(r"\w+ \d+( \(\w+ \d+\))?( or \d+( \(\w+ \d+\))?)?", group), line
        key = group.split()[0]
        for n, also, value in re.findall(r" (\d+)(?: \((\w+) (\d+)\))?(?= or|$)", group):
            found.append({key: int(n)} | ({also: int(value)} if also else {}))
    assert found
    return found


SECTIONS = {"accumulate": "train", "global_batch_size": "train", "batch_schedule": "train"}
SECTIONS |= dict.fromkeys((*MESH_AXES, "chunks"), "layout")


def raised(schedule, unit, line):
    """Each of its batches that a line names as large as the next multiple of unit."""
    named = re.search(r"has batches of (.*) sequences,", line)[1]

    def larger(size):
        n = int(size[1])
        return f":{-(-n // unit) * unit if str(n) in re.split(', | or ', named) else n}"

    return re.sub(r":(\d+)", larger, schedule)


def assert_mends(settings, devices, line):
    """Every value that a line names takes away that line, and adds none."""
    before = refused(tiny_run(**settings), devices)
    subjects = {text.split(" = ")[0] for text in before[1:]}
    for hint in hints(line):
        new = {section: dict(values) for section, values in settings.items()}
        if unit := hint.get("batch_schedule"):
            hint = {"batch_schedule": raised(settings["train"]["batch_schedule"], unit, line)}
        for key, value in hint.items():
            new.setdefault(SECTIONS.get(key, "model"), {})[key] = value
        try:
            Layout.from_config(tiny_run(**new), devices)
            left = set()
        except LayoutError as why:
            left = {text.split(" = ")[0] for text in str(why).splitlines()[1:]}
        assert left <= subjects - {line.split(" = ")[0]}, (line, hint, left)


@hypothesis.settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_values_that_a_message_names_work(data):
    size = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    heads = size(2, 4, 6, 12)
    wanted = {
        "model": {
            "n_layers": size(1, 2, 3, 4, 6, 8, 12), "n_heads": heads, "d_model": heads * 16,
            # one that is the default's would be taken for it
            "n_kv_heads": size(None, *(k for k in (1, 2, 3, 4, 6) if heads % k == 0 and k < heads)),
            "d_mlp": size(64, 96, 100, 128), "seq_len": size(16, 24, 32, 36),
        },
        "train": {"global_batch_size": size(8, 12, 24, 32, 64)},
        "layout": {
            "pp": size(1, 2, 4), "fsdp": size(1, 2, 3), "cp": size(1, 2), "tp": size(1, 2, 3, 4),
        },
    }  # fmt: skip
    batch, axes = wanted["train"]["global_batch_size"], wanted["layout"]
    wanted["train"]["accumulate"] = size(*(k for k in (1, 2, 4, 6, 8) if batch % k == 0))
    if axes["pp"] > 1:
        axes["chunks"] = size(1, 2, 3)
    axes["dp"] = size(1, 2, 4)
    if axes["tp"] > 1:
        axes["sequence_parallel"] = size(False, True)
    if axes["dp"] > 1:
        axes["zero"] = size(0, 1)
    smaller = [n for n in (2, 4, 8, 16) if n < batch]
    micro = batch // wanted["train"]["accumulate"]
    wanted["train"]["batch_schedule"] = size(
        None, *(f"0:{n} 1K:{batch}" for n in smaller if n <= micro or n % micro == 0)
    )
    wanted["train"]["steps"] = 1000
    devices = math.prod(axes[axis] for axis in MESH_AXES if axis in axes)
    try:
        Layout.from_config(tiny_run(**wanted), devices)
    except LayoutError as why:
        for line in str(why).splitlines()[1:]:
            if "with what goes with it" not in line:
                assert_mends(wanted, devices, line)


@pytest.mark.parametrize(("accumulate", "works"), [(1, True), (2, False)])
def test_a_microbatch_is_split_too(accumulate, works):
    run = tiny_run(
        train={"global_batch_size": 8, "accumulate": accumulate}, layout={"preset": "dp"}
    )
    if works:
        Layout.from_config(run, 8)
    else:
        with pytest.raises(
            LayoutError, match=r"train.global_batch_size / train.accumulate = 4 .* layout.dp = 8"
        ):
            Layout.from_config(run, 8)


def test_two_dims_of_a_weight_on_one_axis_are_refused_by_name():
    cfg = tiny_run().model
    with pytest.raises(LayoutError, match=r"weight blocks.attention.k .* split twice by \['tp'\]"):
        build(cfg, Layout.create(dp=4, tp=2, rules={"embed": ("tp",)}))


def test_a_rank_that_does_not_match_is_refused_by_name():
    cfg = tiny_run().model
    layout = Layout.create(dp=4, tp=2, weights=[("mlp.down", ("mlp",))])
    with pytest.raises(LayoutError, match=r"weight blocks.mlp.down .* has shape \(2, 256, 64\)"):
        build(cfg, layout)


def test_a_size_that_a_rule_by_hand_does_not_divide_is_refused_by_name():
    cfg = tiny_run(model={"d_model": 60, "head_dim": 16, "d_mlp": 64}).model
    layout = Layout.create(fsdp=8, rules={"embed": (), "residual": ("fsdp",), "attn_inner": ()})
    with pytest.raises(LayoutError, match=r"weight blocks.attention.o .* \['residual'\] cannot be"):
        build(cfg, layout)


def test_dims_for_a_weight_that_is_not_there_are_refused():
    layout = Layout.create(dp=4, tp=2, weights=[("mlp.gate", ("embed", "mlp"))])
    with pytest.raises(LayoutError, match=r"no weight is called \['mlp.gate'\]"):
        declare(tiny_run().model, layout)


def test_a_rule_or_the_dims_of_a_weight_can_be_replaced():
    cfg = tiny_run().model
    usual = explained(Layout.create(dp=4, tp=2).fit(cfg), cfg)
    changed = Layout.create(
        dp=4, tp=2, rules={"vocab_in": ()}, weights=[("mlp.up", ("embed", "residual"))]
    ).fit(cfg)
    rows = explained(changed, cfg)
    assert usual["blocks.mlp.up"]["spec"] == P(None, None, "tp")
    assert rows["blocks.mlp.up"]["spec"] == P(None, None, None)
    assert rows["blocks.mlp.up"]["bytes"] == 2 * usual["blocks.mlp.up"]["bytes"]
    assert rows["embedding.tokens"]["spec"] == P(None, None)
    same = usual.keys() - {"blocks.mlp.up", "embedding.tokens"}
    assert all(rows[name] == usual[name] for name in same)
    held = nnx.state(build(cfg, changed), nnx.Param)["blocks"]["mlp"]["up"][...]
    assert held.sharding.shard_shape(held.shape) == held.shape


def test_key_value_heads_are_replicated_where_tp_is_a_multiple_of_them():
    cfg = tiny_run("llama").model  # 4 heads, 2 of keys and values
    assert Layout.create(dp=4, tp=2).fit(cfg).axes("kv_heads") == ("tp",)
    layout = Layout.create(dp=2, tp=4).fit(cfg)
    assert layout.axes("kv_heads") == ()
    assert layout.axes("heads") == ("tp",)
    assert explained(layout, cfg)["blocks.attention.k"]["rule"] == "replicated"
    # a row set by hand stays
    by_hand = Layout.create(dp=2, tp=4, rules={"kv_heads": ("dp",), "batch": ()})
    assert by_hand.fit(cfg).axes("kv_heads") == ("dp",)


def test_a_table_that_does_not_divide_by_tp_times_fsdp_is_split_both_ways():
    cfg = tiny_run(model={"d_model": 96, "n_heads": 12, "vocab_size": 128}).model
    rows = explained(Layout.create(24, fsdp=6, tp=4).fit(cfg), cfg)
    assert rows["embedding.tokens"]["spec"] == P("tp", "fsdp")  # 128 rows, 24 shards
    assert rows["embedding.positions"]["spec"] == P(None, None)  # 32 positions, 6 shards
    by_hand = Layout.create(24, fsdp=6, tp=4, rules={"vocab_in": ("tp",)}).fit(cfg)
    assert explained(by_hand, cfg)["embedding.tokens"]["spec"] == P("tp", None)
    by_hand = Layout.create(24, fsdp=6, tp=4, rules={"vocab_in": ("fsdp",)})
    with pytest.raises(LayoutError, match=r"vocab_size \(padded\) = 128 .* layout.fsdp = 6; try"):
        by_hand.fit(cfg)


@pytest.mark.smoke
@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["fsdp", "tp"])
def test_weights_and_moments_have_the_shards_that_explain_says(name, style):
    run = tiny_run(style)
    layout = tiny_layout(run, **LAYOUTS[name])
    state = make_steps(run, layout).init()
    rows = explained(layout, run.model)
    mu, nu = state.opt_state[1].mu, state.opt_state[1].nu
    for tree in (state.params, mu, nu):
        leaves = jax.tree_util.tree_leaves(tree)
        assert len(leaves) == len(rows)
        for (weight, row), x in zip(rows.items(), leaves, strict=True):
            split = [(axes,) if isinstance(axes, str) else axes or () for axes in row["spec"]]
            ways = [math.prod(layout.mesh.shape[axis] for axis in axes) for axes in split]
            shard = tuple(n // w for n, w in zip(x.shape, ways, strict=True))
            assert x.shape == row["shape"], weight
            assert {s.data.shape for s in x.addressable_shards} == {shard}, weight
            assert row["bytes"] == x.addressable_shards[0].data.nbytes
    assert named(state.params).keys() == rows.keys()
    whole = {weight for weight, row in rows.items() if row["rule"] == "replicated"}
    vectors = {w for w, row in rows.items() if len(row["shape"]) - ("layer" in row["dims"]) == 1}
    if name == "fsdp":  # nothing but norms and biases is whole on a device
        assert whole <= vectors
        split = [row for weight, row in rows.items() if weight not in whole]
        assert all(row["bytes"] * 8 == 4 * math.prod(row["shape"]) for row in split)
    else:  # k and v of 2 heads are whole on tp 4
        kv = {"blocks.attention.k", "blocks.attention.v"} if style == "llama" else set()
        assert whole - vectors == kv | ({"embedding.positions"} if style == "gpt2" else set())
        assert rows["blocks.mlp.up"]["spec"] == P(None, None, "tp")
        assert rows["blocks.mlp.down"]["spec"] == P(None, "tp", None)
        assert rows["embedding.tokens"]["spec"] == P("tp", None)


def test_zero_puts_dp_on_the_first_dim_that_divides_and_never_on_layers():
    run = tiny_run(model={"n_layers": 8, "d_model": 40, "d_mlp": 64}, layout={"zero": 1, "tp": 2})
    layout = Layout.from_config(run, 16)  # dp 8
    params = nnx.state(declare(run.model, layout), nnx.Param)

    def specs(layout):
        of_moments = layout.placed(params, of_optimizer=True)["blocks"]
        return [of_moments[a][b].sharding.spec for a, b in (("mlp", "up"), ("attention", "q_bias"))]

    assert specs(layout) == [P(None, "dp", "tp"), P(None, "tp")]  # 40 does not divide by 2 * 8
    by_hand = dataclasses.replace(layout, rules=layout.rules | {"mlp": ("tp", "dp")})
    assert specs(by_hand) == [P(None, None, ("tp", "dp")), P(None, "tp")]
    assert layout.placed(params)["blocks"]["mlp"]["up"].sharding.spec == P(None, None, "tp")
    assert Layout.from_config(run, 2, training=False).zero == 0  # nothing to split, nothing refused


def test_a_layout_for_512_devices_is_explained_without_them():
    start = time.perf_counter()
    run = load_config("llama:3-8b", {"layout.fsdp": 64, "layout.tp": 8})
    rows = explained(Layout.from_config(run, 512), run.model)
    assert time.perf_counter() - start < 2
    assert sum(math.prod(row["shape"]) for row in rows.values()) == 8_030_261_248
    assert rows["blocks.mlp.up"]["spec"] == P(None, "fsdp", "tp")
    assert rows["blocks.mlp.down"]["spec"] == P(None, ("tp", "fsdp"), None)
    assert rows["blocks.mlp.down"]["bytes"] == 4 * 32 * 4096 * 14336 // 512
    whole = sum(row["bytes"] for row in rows.values() if row["rule"] == "replicated")
    assert whole < 2e6  # norms
