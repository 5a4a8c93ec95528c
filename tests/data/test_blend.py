import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_jax.data import blend_order
from mlm_jax.data.blend import Blend, parse_blend, read_blends
from mlm_jax.data.blend_order import (
    blend_index,
    exhaustive_index,
    greedy,
    normalised,
    samples_per_dataset,
)
from mlm_jax.errors import DataError

positive = st.floats(1e-9, 1.0) | st.sampled_from([1.0, 2.0, 3.0, 0.5, 1e-6])
equal = st.integers(1, 20).map(lambda count: [1.0] * count)
some_weights = st.lists(positive, min_size=1, max_size=20) | equal


@settings(max_examples=60, deadline=None)
@given(some_weights, st.integers(0, 3000), st.sampled_from([2**4, 2**8, 2**15]))
def test_blocks_together_do_what_one_loop_does(weights, size, cells):
    """Few cells: long blocks. Many: the shortest blocks, and many that are unsure."""
    weights = normalised(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_order, "CELLS", cells)
        index = blend_index(weights, size)
    assert (index.dataset.dtype, index.sample.dtype) == (np.int16, np.int64)
    dataset, sample = loop(weights, size)
    assert index.dataset.tolist() == dataset
    assert index.sample.tolist() == sample


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60) | st.integers(1, 900), min_size=1, max_size=20))
def test_exhaustive_takes_all_of_each_once(sizes):
    index = exhaustive_index(sizes)
    assert np.bincount(index.dataset).tolist() == sizes
    for d, size in enumerate(sizes):
        assert index.sample[index.dataset == d].tolist() == list(range(size))
    weights = [size / float(sum(sizes)) for size in sizes]
    dataset, sample = loop(weights, sum(sizes), sizes)
    assert index.dataset.tolist() == dataset
    assert index.sample.tolist() == sample


@pytest.mark.parametrize("cells", [2**4, 2**15])
def test_what_is_used_up_is_taken_no_more(cells, monkeypatch):
    """Weights that are not the limits' shares, which by rounding those of many samples may be."""
    monkeypatch.setattr(blend_order, "CELLS", cells)
    weights, limits = [0.5, 0.3, 0.2], [10, 700, 290]
    index = greedy(np.array(weights), 1000, np.array(limits, np.float64))
    dataset, sample = loop(weights, 1000, limits)
    assert index.dataset.tolist() == dataset
    assert index.sample.tolist() == sample
    assert np.bincount(index.dataset).tolist() == limits


@settings(max_examples=20, deadline=None)
@given(some_weights, st.integers(0, 5000), st.integers(0, 5000))
def test_fewer_samples_are_the_beginning_of_more(weights, fewer, more):
    fewer, more = sorted((fewer, more))
    short, long = (blend_index(normalised(weights), size) for size in (fewer, more))
    np.testing.assert_array_equal(short.dataset, long.dataset[:fewer])
    np.testing.assert_array_equal(short.sample, long.sample[:fewer])


@pytest.mark.parametrize("weights", [[1e-7, 1], [1, 1e-5, 1e-7, 1e-3, 1e-9], [1] * 33, [3, 1, 2]])
def test_a_guess_that_is_not_forgotten_is_corrected(weights, monkeypatch):
    """Starts that are certainly wrong take longer and change nothing."""
    size, weights = 50_000, normalised(weights)
    right = blend_index(weights, size)
    dataset, sample = loop(weights, 3000)
    assert right.dataset[:3000].tolist() == dataset
    assert right.sample[:3000].tolist() == sample
    wrong = lambda weights, i: np.tile(i[:, None] / len(weights), len(weights)).round()  # noqa: E731
    monkeypatch.setattr(blend_order, "guess", wrong)
    for ours, theirs in zip(right, blend_index(weights, size), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("weights", "size", "surplus", "sizes"),
    [
        ([0.7, 0.3], 3000, 0.005, [2111, 905]),
        ([0.7, 0.3], 3000, 0.0, [2100, 900]),
        ([0.1, 0.2, 0.7], 10, 0.0, [1, 2, 7]),
        ([1 / 3, 2 / 3], 100, 0.0, [34, 67]),  # one more than were asked for
        ([0.55, 0.45], 100, 0.0, [56, 45]),  # 55.000000000000007 in float64
        ([1.0], 200, 0.005, [201]),
        ([0.5, 0.5], 0, 0.005, [0, 0]),
    ],
)
def test_samples_per_dataset(weights, size, surplus, sizes):
    assert samples_per_dataset(weights, size, surplus) == sizes


@pytest.mark.parametrize("weights", [[], [0.5, 0.6], [-0.5, 1.5], [float("nan"), 1.0], [70, 30]])
def test_an_order_needs_weights_that_add_up_to_1(weights):
    for refuse in (blend_index, samples_per_dataset):
        with pytest.raises(DataError, match="add up to 1"):
            refuse(weights, 10)


@pytest.mark.parametrize("sizes", [[], [3, 0], [-1, 2]])
def test_an_exhaustive_order_needs_samples(sizes):
    with pytest.raises(DataError, match="1 or more"):
        exhaustive_index(sizes)


@pytest.mark.parametrize(
    ("text", "prefixes", "weights"),
    [
        ("a", ("a",), None),
        ("a b", ("a", "b"), None),
        ("a b c", ("a", "b", "c"), None),
        ("a b c d", ("a", "b", "c", "d"), None),
        ("0.7 a 0.3 b", ("a", "b"), (0.7, 0.3)),
        ("30 a 70 b", ("a", "b"), (30.0, 70.0)),
        ("1 a", ("a",), (1.0,)),
        ("1e-3  'with space/a'\n 2 s3://bucket/b", ("with space/a", "s3://bucket/b"), (1e-3, 2.0)),
        ("1 ./30", ("./30",), (1.0,)),
    ],
)
def test_a_blend_from_text(text, prefixes, weights, tmp_path):
    assert parse_blend(text) == read_blends(text) == Blend(prefixes, weights)
    (tmp_path / "blend.txt").write_text(text)
    assert read_blends(str(tmp_path / "blend.txt")) == Blend(prefixes, weights)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["0 prefixes"]),
        ("a 'b", ["No closing quotation", "'in quotes'"]),
        ("0.7 a 0.3", ["0.7 where a prefix is expected", "0.3 where a prefix is expected"]),
        ("0.7 a b c", ["0.7 where a prefix is expected"]),
        ("a b 0.3 c", ["0.3 where a prefix is expected"]),
        ("0.7 0.3", ["0.3 where a prefix is expected"]),
        ("a b a", ["a 2 times", "sum of its weights"]),
        ("-1 a 0 b nan c inf d 2 d", [
            "weight -1.0 of a", "weight 0.0 of b", "weight nan of c", "weight inf of d",
            "d 2 times", "a number above 0",
        ]),
        ("0 a 0 b", ["weight 0.0 of a", "weight 0.0 of b"]),
        ("1e308 a 1e308 b", ["sum is infinite"]),
        ("1 ''", ["empty prefix"]),
    ],
)  # fmt: skip
def test_every_problem_of_a_blend_is_named(text, problems):
    with pytest.raises(DataError) as refused:
        parse_blend(text)
    assert [p for p in problems if p not in str(refused.value)] == []


def test_a_blend_needs_a_weight_for_each_prefix():
    with pytest.raises(DataError, match="1 weights for 2 prefixes"):
        Blend(("a", "b"), (1.0,))


@pytest.mark.parametrize(
    ("content", "blends"),
    [
        ('["a", "b"]', Blend(("a", "b"))),
        ('[0.7, "a", "0.3", "b"]', Blend(("a", "b"), (0.7, 0.3))),
        ('"0.7 a 0.3 b"', Blend(("a", "b"), (0.7, 0.3))),
        (
            '{"train": ["30", "a", "70", "b"], "valid": "c d", "test": null}',
            {"train": Blend(("a", "b"), (30.0, 70.0)), "valid": Blend(("c", "d"))},
        ),
    ],
)
def test_a_blend_from_json(content, blends, tmp_path):
    (tmp_path / "blend.json").write_text(content)
    assert read_blends(str(tmp_path / "blend.json")) == blends


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not JSON"),
        ("7", "7 is no blend"),
        ('["a", null]', r"\['a', None\] is no blend"),
        ('{"train": ["a"], "validation": ["b"]}', "'validation'; there are train, valid, test"),
        ('{"test": null}', "no split"),
        ('{"train": ["a", "a"], "valid": [0, "b"]}', "train: (?s:.*)a 2 times(?s:.*)weight 0.0"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_a_bad_json_file_is_named(content, problem, tmp_path):
    file = tmp_path / "blend.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=rf"blend\.json: {problem}"):
        read_blends(str(file))


def test_a_missing_file_of_a_blend_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no\.txt: no such file$"):
        read_blends(str(tmp_path / "no.txt"))


def loop(weights, size, limits=None):
    """The published rule, a sample at a time."""
    taken, dataset, sample = [0] * len(weights), [], []
    for i in range(size):
        best = None
        for d, weight in enumerate(weights):
            if limits is None or taken[d] < limits[d]:
                behind = weight * float(max(i, 1)) - float(taken[d])
                if best is None or behind > best[0]:
                    best = behind, d
        dataset.append(best[1])
        sample.append(taken[best[1]])
        taken[best[1]] += 1
    return dataset, sample
