import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlm_jax.data import sampling
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.indexed_writer import IndexedWriter
from mlm_jax.data.sampling import GptSamples, build_index, split_ranges
from mlm_jax.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden"
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def prose():
    return IndexedDataset(GOLDEN / "data" / "prose_a_text_document")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", ["one_epoch", "many_epochs", "everything"])
def test_equals_megatron(case, split, prose):
    samples, golden, part = build(prose, case, split)
    assert len(samples) == part["length"]
    for name in ("document", "sample", "shuffle"):
        ours, megatrons = getattr(samples.index, name), golden(f"0_{name}_index")
        assert ours.dtype == megatrons.dtype
        np.testing.assert_array_equal(ours, megatrons)
    first_six = np.stack([samples[i] for i in range(6)])
    np.testing.assert_array_equal(first_six[:, :-1], golden("tokens"))
    np.testing.assert_array_equal(first_six[:, 1:], golden("labels"))
    assert first_six.dtype == np.int32
    assert np.all(golden("loss_mask") == 1)  # nothing is padded


def test_a_short_last_epoch_is_shuffled_apart(prose):
    """9000 samples: 8601 end in five epochs of 1720, so the sixth gives 399 < 0.8 * 1720."""
    _, golden, _ = build(prose, "many_epochs", "train")
    document, shuffle, sequences = golden("0_document_index"), golden("0_shuffle_index"), 53
    assert len(document) == 6 * sequences
    assert sorted(document[-sequences:]) == list(range(sequences))
    tokens = int(prose.lengths[:sequences].sum())
    before_last, of_one_epoch = (5 * tokens - 1) // 64, (tokens - 1) // 64
    assert (before_last, of_one_epoch) == (8601, 1720)
    assert sorted(shuffle[:before_last]) == list(range(before_last))

    size = dict(seq_len=64, seed=1234)
    nearly_all = before_last + int(0.8 * of_one_epoch)
    together = build_index(prose.lengths, range(sequences), n_samples=nearly_all, **size)
    assert len(together.document) == len(document)
    assert sorted(together.shuffle[:before_last]) != list(range(before_last))
    apart = build_index(prose.lengths, range(sequences), n_samples=nearly_all - 1, **size)
    np.testing.assert_array_equal(apart.shuffle, shuffle)
    np.testing.assert_array_equal(apart.document, document)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12) | st.just(0), max_size=30).map(lambda some: [*some, 3]),
    first=st.integers(0, 30),
    n_samples=st.none() | st.integers(1, 150),
    seq_len=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    at_once=st.sampled_from([1, 5, 64, 2**18]),
)
def test_it_is_what_a_walk_token_by_token_finds(lengths, first, n_samples, seq_len, seed, at_once):
    sequences = range(min(first, len(lengths) - 1), len(lengths))
    tokens = sum(lengths[s] for s in sequences)
    assume(n_samples is not None or tokens > seq_len)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "LOCATED_AT_ONCE", at_once)
        size = dict(n_samples=n_samples, seq_len=seq_len, seed=seed)
        index = build_index(np.array(lengths, np.int32), sequences, **size)
    for ours, walked in zip(index, walk(lengths, sequences, **size), strict=True):
        np.testing.assert_array_equal(ours, walked)
    assert sorted(index.shuffle) == list(range(len(index.shuffle)))
    epochs = len(index.document) // len(sequences)
    assert sorted(index.document) == sorted([*sequences] * epochs)
    if n_samples is None:
        assert epochs == 1
    else:  # enough, and no epoch too many
        assert len(index.shuffle) >= n_samples
        assert (epochs - 1) * tokens < n_samples * seq_len + 1 <= epochs * tokens


def test_a_sample_is_a_stretch_of_the_stream(tmp_path):
    """Several sequences in a sample, several samples in a sequence, empty sequences between."""
    with IndexedWriter(tmp_path / "d", np.int64) as writer:
        lengths, token = [1, 0, 2, 20, 0, 1, 1, 9], 0
        for length in lengths:
            writer.add_document([np.arange(token, token + length)])
            token += length
    indexed = IndexedDataset(tmp_path / "d")
    samples = GptSamples(indexed, range(8), n_samples=40, seq_len=5, seed=3)
    stream = np.concatenate([indexed.tokens(s) for s in samples.index.document])
    for i, k in enumerate(samples.index.shuffle.tolist()):
        np.testing.assert_array_equal(samples[i], stream[5 * k : 5 * k + 6])
        assert samples[i].dtype == np.int32
    with pytest.raises(IndexError):
        samples[len(samples)]


def test_a_sample_reads_nothing_but_itself(tmp_path, monkeypatch):
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document([np.arange(1000)])
    samples = GptSamples(
        IndexedDataset(tmp_path / "d"), range(1), n_samples=None, seq_len=10, seed=1
    )
    read, before = [], IndexedDataset._read
    monkeypatch.setattr(
        IndexedDataset, "_read", lambda s, *ends: read.append(ends) or before(s, *ends)
    )
    for i, k in enumerate(samples.index.shuffle.tolist()):
        np.testing.assert_array_equal(samples[i], np.arange(10 * k, 10 * k + 11))
    assert {end - begin for begin, end in read} == {11}


def test_pickle_sends_arguments_not_the_index(prose):
    samples = GptSamples(prose, range(53), n_samples=9000, seq_len=64, seed=1)
    sent = pickle.dumps(samples)
    assert len(sent) < 1000
    for ours, theirs in zip(samples.index, pickle.loads(sent).index, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_seed_decides(prose):
    def shuffled(seed):
        size = dict(n_samples=None, seq_len=64, seed=seed)
        return build_index(prose.lengths, range(60), **size).shuffle.tolist()

    assert shuffled(1) == shuffled(1)
    assert shuffled(1) != shuffled(2)


def test_fewer_tokens_than_a_sample_are_repeated_until_they_make_one():
    lengths = np.array([3, 2], np.int32)
    index = build_index(lengths, range(2), n_samples=2, seq_len=8, seed=1)
    assert len(index.document) == 2 * 4  # 4 epochs of 5 tokens hold 2 * 8 + 1
    index = build_index(lengths, range(2), n_samples=1, seq_len=5, seed=1)
    assert len(index.document) == 2 * 2  # one epoch lacks the last target
    with pytest.raises(DataError, match="5 tokens are too few for one sample of 9"):
        build_index(lengths, range(2), n_samples=None, seq_len=8, seed=1)


@pytest.mark.parametrize("sequences", [range(2, 2), range(1, 3)], ids=["no sequence", "no token"])
@pytest.mark.parametrize("n_samples", [None, 10])
def test_an_empty_split_is_refused(sequences, n_samples):
    lengths = np.array([5, 0, 0, 5], np.int32)
    with pytest.raises(DataError, match=f"split of {len(sequences)} sequences with 0 tokens"):
        build_index(lengths, sequences, n_samples=n_samples, seq_len=2, seed=1)


def test_errors_name_the_file(prose, tmp_path):
    with pytest.raises(DataError, match="prose_a_text_document: a split of 0 sequences"):
        GptSamples(prose, range(0), n_samples=None, seq_len=64, seed=1)
    with IndexedWriter(tmp_path / "d", np.float32) as writer:
        writer.add_document([[0.5, 1.5]])
    with pytest.raises(DataError, match=r"d\.bin: float32 values are not token ids"):
        GptSamples(IndexedDataset(tmp_path / "d"), range(1), n_samples=None, seq_len=1, seed=1)


@pytest.mark.parametrize(
    ("split", "n", "ends"),
    [
        ("969, 30, 1", 1000, (969, 999, 1000)),
        ("969,30,1", 100, (97, 100, 100)),
        ("88,8,4", 60, (53, 58, 60)),
        ("1 1", 3, (2, 3, 3)),  # 1.5 rounds to even, as Python rounds
        ("1 1", 5, (2, 5, 5)),
        ("100", 7, (7, 7, 7)),
        ("0,0,1", 7, (0, 0, 7)),
        ("0.98, 0.01, 0.01", 0, (0, 0, 0)),
    ],
)
def test_split_ranges(split, n, ends):
    train, valid, test = split_ranges(split, n)
    assert (train.start, train.stop, valid.stop, test.stop) == (0, *ends)
    assert (valid.start, test.start) == (train.stop, valid.stop)


@pytest.mark.parametrize(
    "split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1", "inf", "1e308,1e308"]
)
def test_a_bad_split_is_refused(split):
    with pytest.raises(DataError, match="969"):
        split_ranges(split, 10)


def walk(lengths, sequences, *, n_samples, seq_len, seed):
    """The published algorithm without any arithmetic that could be done by counting."""
    epochs, tokens = 1, sum(lengths[s] for s in sequences)
    while n_samples is not None and epochs * tokens < n_samples * seq_len + 1:
        epochs += 1
    apart = False
    if epochs > 1:
        in_the_last = n_samples - ((epochs - 1) * tokens - 1) // seq_len
        apart = in_the_last < int(0.80 * ((tokens - 1) // seq_len))

    rng = np.random.RandomState(seed)

    def shuffled(*parts):
        arrays = [np.array(part, np.int64) for part in parts]
        for array in arrays:
            rng.shuffle(array)
        return np.concatenate(arrays)

    if apart:
        document = shuffled([*sequences] * (epochs - 1), [*sequences])
    else:
        document = shuffled([*sequences] * epochs)

    position = token = 0
    sample = [(0, 0)]
    while True:
        for _ in range(seq_len):
            while position < len(document) and token == lengths[document[position]]:
                position, token = position + 1, 0  # past the end of it and of empty ones
            token += 1
        while position < len(document) and token == lengths[document[position]]:
            position, token = position + 1, 0
        if position >= len(document):
            break  # the last target of this sample is missing
        sample.append((position, token))

    n = len(sample) - 1
    boundary = ((epochs - 1) * tokens - 1) // seq_len if apart else n
    return document, np.array(sample), shuffled(range(boundary), range(boundary, n))


def build(prose, case, split):
    folder, number = GOLDEN / "gpt_dataset" / case, SPLITS.index(split)
    meta = json.loads((folder / "meta.json").read_text())
    sequences = split_ranges(meta["split"], len(prose))[number]
    part = meta["splits"][split]["parts"][0]
    assert (sequences.start, len(sequences)) == (part["first"], part["count"])
    size = dict(n_samples=meta["requested"][number], seq_len=meta["seq_len"], seed=meta["seed"])
    return (
        GptSamples(prose, sequences, **size),
        lambda name: np.load(folder / f"{split}_{name}.npy"),
        part,
    )
