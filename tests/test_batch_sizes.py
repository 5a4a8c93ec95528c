import pytest

from mlm_jax.batch_sizes import BatchSizes, parse_schedule
from mlm_jax.door import from_dict
from mlm_jax.errors import ConfigError
from tests.conftest import tiny_run


def megatron(schedule, batches):
    """Size and start of each batch, by asking before each what was consumed."""
    consumed, walk = 0, []
    for _ in range(batches):
        size = [size for threshold, size in schedule if consumed >= threshold][-1]
        walk.append((size, consumed))
        consumed += size
    return walk


@pytest.mark.parametrize(
    "schedule",
    [
        [(0, 8)],
        [(0, 2), (10, 4), (30, 8)],
        [(0, 3), (10, 4), (31, 5)],  # thresholds between two batches
        [(0, 100), (10, 3), (20, 7)],  # the second size is never used
        [(0, 7), (7, 1), (8, 2)],
    ],
    ids=str,
)
def test_sizes_and_starts_are_those_of_a_walk(schedule):
    sizes = BatchSizes(schedule)
    walk = megatron(schedule, 40)
    assert [(sizes.size(k), sizes.start(k)) for k in range(40)] == walk
    assert {size for size, _ in walk} <= set(sizes.sizes())


def test_thresholds_are_tokens():
    assert parse_schedule("0:768 250B:1536, 500b:3072", 4096) == [
        (0, 768), (250_000_000_000 // 4096, 1536), (500_000_000_000 // 4096, 3072),
    ]  # fmt: skip
    assert parse_schedule("0:1 2.5K:2", 100) == [(0, 1), (25, 2)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" ", "begins with 0:SIZE"),
        ("1K:8", "begins with 0:SIZE"),
        ("0:8 1K", "'1K' is none"),
        ("0:8 1X:16", "'1X:16' is none"),
        ("0:8 -1:16", "'-1:16' is none"),
        ("0:0 1K:8", "sizes of 1 or more"),
        ("0:8 2K:16 1K:32", "more tokens in each entry"),
        ("0:8 10:16", "at least 32 more"),  # within one sample
        ("0:8 1K:32", "ends with 32, not with train.global_batch_size=16"),
        ("0:8 1K:12 2K:16", "12 is no multiple of a microbatch, 8 sequences"),
        ("0:16", "has one size; set train.global_batch_size"),
        ("0:8 900T:16", "does not come to its last size in train.steps=1000"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(text, said):
    train = {"global_batch_size": 16, "accumulate": 2, "batch_schedule": text}
    with pytest.raises(ConfigError, match=r"train\.batch_schedule") as refused:
        from_dict({"train": train, "model": {"seq_len": 32}})
    assert said in str(refused.value)


def test_microbatches_keep_their_size():
    run = tiny_run(train={
        "global_batch_size": 32, "accumulate": 4, "batch_schedule": "0:4 1K:8 2K:24 4K:32",
        "steps": 100,
    })  # fmt: skip
    assert [run.train.microbatches(size) for size in (4, 8, 24, 32)] == [1, 1, 3, 4]
    assert BatchSizes.of(run).sizes() == [4, 8, 24, 32]
    assert BatchSizes.of(run).sizes(batches=1) == [4]
