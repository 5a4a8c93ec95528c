"""Profiles: ranges that make sense, self times, and a table of a real trace."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mlm_jax.errors import ConfigError
from mlm_jax.profiling import (
    SHOWN,
    Operation,
    Profiler,
    Span,
    operations,
    origin,
    self_times,
    table,
)


@pytest.mark.parametrize("text", ["10:13", "10:11", "1:2"])
def test_a_range_is_a_slice_of_steps(text):
    first, stop = map(int, text.split(":"))
    assert Span.parse(text) == (first, stop - 1)


@pytest.mark.parametrize(
    "text", ["", "10", "10:", ":3", "0:3", "3:3", "13:10", "-1:3", "1:2:3", "a:b"]
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ConfigError, match=f"--profile '{text}' is no range of steps; 10:13 are"):
        Span.parse(text)


@pytest.mark.parametrize(
    ("span", "done", "said"),
    [
        (Span(10, 12), 9, None),
        (Span(18, 20), 0, None),
        (Span(20, 22), 0, "takes the steps 1 to 20; try --profile 1:4"),
        (Span(10, 12), 10, "takes the steps 11 to 20; try --profile 11:14"),
        (Span(10, 12), 19, "takes the steps 20 to 20; try --profile 20:21"),
        (Span(10, 12), 20, "no step is left of train.steps=20"),
    ],
)
def test_steps_that_the_run_does_not_take_are_refused(span, done, said):
    if said is None:
        span.check(done, 20)
        return
    with pytest.raises(ConfigError, match=said) as refused:
        span.check(done, 20)
    if "try" in said:  # what it suggests works
        Span.parse(str(refused.value).split()[-1]).check(done, 20)


def test_the_time_of_an_operation_is_without_those_inside_it():
    spans = [(0, 100, "loop"), (10, 40, "dot"), (40, 60, "fusion"), (45, 50, "add")]
    spans += [(100, 130, "dot"), (120, 140, "late")]  # two that overlap: no time counts twice
    told = sorted(self_times(iter(spans)))
    assert told == [
        ("add", 5),
        ("dot", 20),
        ("dot", 30),
        ("fusion", 15),
        ("late", 20),
        ("loop", 50),
    ]
    assert sum(time for _, time in told) == 140


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("jit(train_step)/jvp()/while/body/closed_call/mlp/dot_general", "forward mlp/dot_general"),
        ("jit(f)/transpose(jvp())/while/body/checkpoint/mlp/add_any", "backward mlp/add_any"),
        ("transpose(jvp())/checkpoint/rematted_computation/attention/vmap()/div",
         "recomputed attention/div"),
        ("jit(f)/transpose(jvp(BTD,VD->BTV))/dot_general", "backward BTD,VD->BTV/dot_general"),
        ("jvp()/while/(mlp/mul:mlp/add:mlp/dot_general)", "forward mlp/mul, ..."),
        ("jit(f)/optimizer/jit(_where)/select_n", "optimizer/_where/select_n"),
    ],
)  # fmt: skip
def test_an_operation_is_called_after_its_pass_and_scopes(path, said):
    assert origin(path) == said


def test_the_table_has_the_first_operations_and_the_sum_of_the_rest():
    rows = [Operation(f"dot.{i}", "mlp/dot", 2.0, 2 / 80, 1.0) for i in range(SHOWN + 10)]
    lines = table(rows, Span(10, 12)).splitlines()
    assert lines[0].startswith("Operations of steps 10 to 12: 80.0 ms a step")
    assert lines[2].split() == ["2.00", "2.5%", "1", "dot.0", "mlp/dot"]
    assert lines[-1].split() == ["20.00", "25.0%", "10", "more"]
    assert len(lines) == 2 + SHOWN + 1


def test_kernels_of_a_gpu_count_and_their_launches_do_not():
    def event(name, ns, **stats):
        return Named(name, start_ns=0, duration_ns=ns, stats=stats.items())

    ours, theirs = ({"hlo_op": "dot.1", "hlo_module": name} for name in ("jit_step", "jit_other"))
    stream = Named("Stream #13(Compute)", events=[
        event("gemm", 6e6, **ours), event("gemm", 9e6, **theirs), event("MemcpyH2D", 5e6),
    ])  # fmt: skip
    thread = Named("python", events=[event("cuLaunchKernel", 1e6, **ours)])
    planes = [Named("/host:CPU", lines=[thread]), Named("/device:GPU:0", lines=[stream])]
    hlo = (
        'HloModule jit_step, x={}\n  %dot.1 = f32[8] dot(), metadata={op_name="jit(step)/mlp/dot"}'
    )
    rows = operations(Named("", planes=planes), hlo, Span(10, 12))
    assert rows == [Operation("dot.1", "mlp/dot", 2.0, 1.0, 1 / 3)]


class Named(SimpleNamespace):
    """What jax.profiler.ProfileData, its planes, lines and events look like."""

    def __init__(self, name, **fields):
        super().__init__(name=name, **fields)


@pytest.mark.smoke
def test_a_trace_of_two_steps_becomes_a_table(tmp_path):
    def loss(w, x):
        body = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        with jax.named_scope("mlp"):
            return jax.lax.scan(body, x, w)[0].sum()

    w, x = jnp.ones((3, 128, 128)), jnp.ones((128, 128))
    step = jax.jit(jax.grad(loss)).lower(w, x).compile()
    other = jax.jit(lambda x: x @ x @ x)
    other(x).block_until_ready()
    profiler = Profiler(tmp_path)
    profiler.start(7)
    for _ in range(2):
        step(w, x).block_until_ready()
        other(x).block_until_ready()  # of another program: not in the table
    profiler.stop(8, step)
    content = json.loads((tmp_path / "operations.json").read_text())
    assert content["steps"] == [7, 8]
    assert list((tmp_path / content["trace"]).glob("*.trace.json.gz"))
    rows = content["operations"]
    assert {row["name"] for row in rows} <= set(step.as_text().replace("%", " ").split())
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert rows == sorted(rows, key=lambda row: -row["ms_per_step"])
    products = [row for row in rows if row["origin"].endswith("mlp/dot_general")]
    assert {row["origin"].split()[0] for row in products} == {"forward", "backward"}
    assert {row["calls_per_step"] for row in products} == {3.0}  # once a layer
    assert "mlp/dot_general" in (tmp_path / "operations.txt").read_text()
