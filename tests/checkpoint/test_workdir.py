"""A run's folder keeps its tokenizer, of whatever kind."""

import json
from pathlib import Path

import pytest

from mlm_jax.checkpoint.workdir import check_same_run, read_run, saved_tokenizer, write_run
from mlm_jax.config import RunConfig
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.door import from_dict
from mlm_jax.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = [
    GOLDEN / "data" / "tokenizer",
    *(GOLDEN / "tokenizers" / name for name in ("bpe.model", "unigram.model", "vocab.txt")),
    "bytes",
]


@pytest.mark.parametrize("path", KINDS, ids=str)
def test_a_tokenizer_of_any_kind_is_kept_and_another_refused(path, tmp_path):
    run, tokenizer = RunConfig(), load_tokenizer(path)
    write_run(tmp_path, run, tokenizer, {})
    assert load_tokenizer(saved_tokenizer(tmp_path)).same_as(tokenizer)
    check_same_run(tmp_path, run, tokenizer, {})
    for other in KINDS:
        if other != path:
            with pytest.raises(CheckpointError, match="was trained with another tokenizer"):
                check_same_run(tmp_path, run, load_tokenizer(other), {})


def test_one_that_was_not_saved_whole_is_saved_again(tmp_path):
    tokenizer = load_tokenizer("bytes")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"half": ')
    assert saved_tokenizer(tmp_path) is None
    write_run(tmp_path, RunConfig(), tokenizer, {})
    assert load_tokenizer(saved_tokenizer(tmp_path)).same_as(tokenizer)
    assert saved_tokenizer(tmp_path / "nowhere") is None


def test_a_first_start_that_was_killed_leaves_no_tokenizer_to_the_next(tmp_path):
    """config.json comes last: without one, nobody has trained with what is there."""
    write_run(tmp_path, RunConfig(), load_tokenizer(KINDS[0]), {})
    (tmp_path / "config.json").unlink()
    other = load_tokenizer("bytes")
    check_same_run(tmp_path, RunConfig(), other, {})
    write_run(tmp_path, RunConfig(), other, {})
    assert load_tokenizer(saved_tokenizer(tmp_path)).same_as(other)


def test_settings_changed_by_hand_are_refused_unless_their_checksums_are_removed(
    tmp_path,
):
    write_run(tmp_path, RunConfig(), load_tokenizer("bytes"), {})
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content))  # on one line: the same words
    assert read_run(tmp_path) == RunConfig()
    content["model"]["norm_eps"] = 1e-6
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="If you changed it on purpose, remove `checksums`"):
        read_run(tmp_path)
    del content["checksums"]  # as an earlier version wrote it
    path.write_text(json.dumps(content))
    assert read_run(tmp_path) == from_dict({"model": {"norm_eps": 1e-6}})
    write_run(tmp_path, read_run(tmp_path), load_tokenizer("bytes"), {})
    assert "checksums" in json.loads(path.read_text())


@pytest.mark.parametrize("change", ["changed", "gone", "new", "all gone"])
def test_another_tokenizer_in_its_place_is_refused(tmp_path, change):
    write_run(tmp_path, RunConfig(), load_tokenizer("bytes"), {})
    folder = tmp_path / "tokenizer"
    first = sorted(folder.iterdir())[0]
    if change == "changed":
        first.write_text(first.read_text().replace("a", "b", 1))
    elif change == "new":
        first = folder / "vocab.txt"
        first.write_text("a")
    else:
        for path in folder.iterdir() if change == "all gone" else [first]:
            path.unlink()
    with pytest.raises(CheckpointError, match=f"tokenizer/{first.name} (is|was) "):
        saved_tokenizer(tmp_path)
