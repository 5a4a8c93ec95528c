"""Damage at random places of a run's files: found and named, or without any effect.

Never wrong weights, never another model, never an error that is not ours. Each case is a damage of
one file: a byte that becomes another, an end cut off, or the file gone.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mlm_jax.checkpoint.manager import Checkpoints, named
from mlm_jax.checkpoint.manifest import damage
from mlm_jax.checkpoint.workdir import check_same_run, read_run, saved_tokenizer, write_run
from mlm_jax.config import CheckpointConfig
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.errors import CheckpointError
from mlm_jax.step import abstract_state, first_state
from tests.conftest import tiny_layout, tiny_run

CASES = 200
KINDS = ("flip", "cut", "gone")
RUN = tiny_run("llama", model={"d_model": 16, "n_layers": 1, "vocab_size": 256})


class Saved(NamedTuple):
    workdir: Path
    abstract: object  # of the state
    state: object  # NumPy's, as it was saved at step 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Saved:
    """A run with the checkpoints 2 and 4, saved from two devices."""
    workdir = tmp_path_factory.mktemp("saved")
    abstract = abstract_state(RUN, tiny_layout(RUN, fsdp=2))
    leaves, structure = jax.tree.flatten(first_state(RUN, tiny_layout(RUN)))
    rng = np.random.default_rng(0)  # else most of the state would be zeros
    leaves = [rng.normal(size=x.shape, scale=9).astype(x.dtype) for x in leaves]
    state = jax.tree.unflatten(structure, leaves)
    placed = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), state, abstract)
    write_run(workdir, RUN, load_tokenizer("bytes"), {"documents": 7})
    with Checkpoints(workdir, CheckpointConfig(keep=2)) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, placed)
    return Saved(workdir, abstract, state)


def test_damage_of_a_checkpoint_is_named_or_changes_no_value(saved):
    """Of what is found every tenth is restored as well; of what is not, all."""
    step, harmless, refused = saved.workdir / "checkpoints" / "4", 0, 0
    for number, (path, kind) in enumerate(random_cases(step, CASES)):
        name = path.relative_to(step).as_posix()
        with damaged(path, kind, seed=number):
            wrong = damage(step)  # what a restore asks first
            if not wrong:
                harmless += 1
                assert_same(restore(saved), saved.state)
            elif number % 10 == 0:
                refused += 1
                with pytest.raises(CheckpointError) as why:
                    restore(saved)
                assert str(why.value).startswith(f"{step} ")
                assert name in str(why.value) or name == "SHA256SUMS"
        assert bool(wrong) == (name == "SHA256SUMS" or name.startswith("state/")), (number, name)
    assert_same(restore(saved), saved.state)
    assert min(harmless, refused) >= 10


def test_without_checksums_some_of_it_would_be_wrong_weights(saved):
    """Orbax alone: what the checksums are for."""
    step = saved.workdir / "checkpoints" / "4"
    largest = max((step / "state").rglob("*"), key=lambda path: path.stat().st_size)
    silent = 0
    for seed in range(20):
        with damaged(largest, "flip", seed), ocp.StandardCheckpointer() as orbax:
            try:
                state = orbax.restore(step / "state", named(saved.abstract))
            except Exception:
                continue
        silent += not all(
            np.array_equal(x, y)
            for x, y in zip(
                jax.tree.leaves(state), jax.tree.leaves(named(saved.state)), strict=True
            )
        )
    assert silent


def test_damage_of_settings_and_tokenizer_is_named_or_changes_nothing(saved):
    workdir, tokenizer = saved.workdir, load_tokenizer("bytes")
    files = [workdir / "config.json", *(workdir / "tokenizer").iterdir()]
    said = []
    for number in range(3 * CASES):
        rng = random.Random(number)
        path, kind = rng.choice(files), rng.choice(KINDS)
        with damaged(path, kind, seed=number):
            try:
                run, folder = read_run(workdir), saved_tokenizer(workdir)
                check_same_run(workdir, RUN, tokenizer, {"documents": 7})
            except CheckpointError as why:
                said.append((path, str(why)))
                continue
            assert run == RUN
            assert folder is not None
            assert load_tokenizer(folder).same_as(tokenizer)
    assert all(path.name in message for path, message in said)
    assert len(said) > 0.9 * 3 * CASES  # the rest are spaces between the words of config.json


def random_cases(folder: Path, n: int) -> Iterator[tuple[Path, str]]:
    """Files of whatever size alike: names of Orbax's data files are random, their order by size."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    files.sort(key=lambda path: (path.stat().st_size, path.name))
    rng = random.Random(0)
    for _ in range(n):
        yield rng.choice(files), rng.choice(KINDS)


@contextmanager
def damaged(path: Path, kind: str, seed: int) -> Iterator[None]:
    """The file damaged for a while, at a place drawn from seed."""
    rng, content = random.Random(seed), path.read_bytes()
    at = rng.randrange(len(content))
    if kind == "flip":
        bits = rng.choice((1 << rng.randrange(8), rng.randrange(1, 256)))  # one bit: 5 becomes 4
        other = bytes([content[at] ^ bits])
        path.write_bytes(content[:at] + other + content[at + 1 :])
    elif kind == "cut":
        path.write_bytes(content[:at])
    else:
        path.unlink()
    try:
        yield
    finally:
        path.write_bytes(content)


def restore(saved: Saved) -> object:
    with Checkpoints(saved.workdir) as checkpoints:
        return checkpoints.restore(saved.abstract)


def assert_same(one: object, other: object) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), y), one, other)
