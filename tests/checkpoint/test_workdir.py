"""A run's folder keeps its tokenizer, of whatever kind."""

from pathlib import Path

import pytest

from mlm_jax.checkpoint.workdir import check_same_run, saved_tokenizer, write_run
from mlm_jax.config import RunConfig
from mlm_jax.data.tokenizer import load_tokenizer
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
