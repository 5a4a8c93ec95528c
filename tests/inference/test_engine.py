"""Generation: the cache changes nothing but the time it takes."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mlm_jax.errors import ConfigError
from mlm_jax.inference import engine
from mlm_jax.inference.engine import Sampling, generate, generate_ids
from mlm_jax.models import build
from tests.conftest import STYLES, tiny_layout, tiny_run

PROMPTS = [[3, 4, 5], [7] * 11, [9, 8, 499, 2, 1]]  # of different lengths, in one batch
NEW = 12
LAYOUTS = {
    "single": {},
    "pp_cp_tp": {"pp": 2, "cp": 2, "tp": 2},
    "dp_tp_sp": {"dp": 2, "tp": 4, "sequence_parallel": True},
}
DRAW = Sampling(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1)


SLOW = pytest.mark.slow


def tiny_model(style: str, layout: str = "single"):
    run = tiny_run(style)
    return build(run.model, tiny_layout(run, **LAYOUTS[layout]))


FAST = {"gpt2": "single", "llama": "dp_tp_sp", "nouns": "pp_cp_tp"}
CELLS = [
    pytest.param(style, layout, marks=pytest.mark.smoke if FAST[style] == layout else SLOW)
    for style in STYLES
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("style", "layout"), CELLS)
def test_cached_greedy_generation_is_the_argmax_of_the_full_forward(style, layout):
    model = tiny_model(style, layout)
    new = generate_ids(model, PROMPTS, max_tokens=NEW, sampling=Sampling(0))
    whole = np.zeros((8, 32), np.int32)  # padding on the right, which a causal model never sees
    for row, prompt, ids in zip(whole, PROMPTS, new, strict=False):
        row[: len(prompt) + NEW] = prompt + ids
    best = np.asarray(jax.jit(lambda model, tokens: model(tokens).argmax(-1))(model, whole))
    for row, prompt, ids in zip(best, PROMPTS, new, strict=False):
        assert row[len(prompt) - 1 : len(prompt) - 1 + NEW].tolist() == ids
    assert len({tuple(ids) for ids in new}) == 3


@pytest.fixture
def on_a_gpu(monkeypatch):
    """There the layers stay in their stack: programs of the other kind are forgotten."""

    def forget():
        engine.prefill.clear_cache()
        engine.decode.clear_cache()

    def enter():
        monkeypatch.setattr(engine, "layers_apart", lambda model: False)
        forget()

    yield enter
    forget()


def test_layers_in_one_stack_generate_the_same(on_a_gpu):
    model = tiny_model("nouns", "dp_tp_sp")
    expected = generate_ids(model, PROMPTS, max_tokens=NEW, sampling=Sampling(0))
    on_a_gpu()
    assert generate_ids(model, PROMPTS, max_tokens=NEW, sampling=Sampling(0)) == expected


def test_a_seed_repeats_under_every_layout_and_another_seed_does_not():
    one, *others = models = [tiny_model("llama", layout) for layout in LAYOUTS]
    assert others
    texts = [generate_ids(m, PROMPTS, max_tokens=NEW, sampling=DRAW, seed=3) for m in models]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != generate_ids(one, PROMPTS, max_tokens=NEW, sampling=DRAW, seed=4)


def test_few_programs_are_compiled_for_many_lengths_and_settings():
    model = tiny_model("gpt2")
    generate_ids(model, [[1]], max_tokens=3, sampling=DRAW)
    before = engine.prefill._cache_size(), engine.decode._cache_size()
    for length in range(2, 17):
        sampling = DRAW._replace(temperature=0.1 * length, top_k=length)
        generate_ids(model, [[5] * length], max_tokens=length, sampling=sampling, seed=length)
    assert (engine.prefill._cache_size(), engine.decode._cache_size()) == before


def test_the_end_of_a_document_ends_a_row_and_only_that():
    model = tiny_model("gpt2")
    free = generate_ids(model, PROMPTS, max_tokens=NEW, sampling=Sampling(0))
    eod = free[0][4]
    ended = generate_ids(model, PROMPTS, max_tokens=NEW, sampling=Sampling(0), eod_id=eod)
    for with_eod, without in zip(ended, free, strict=True):
        cut = without.index(eod) if eod in without else NEW
        assert with_eod == without[:cut]
    assert len(ended[0]) <= 4


def test_a_text_ends_before_its_first_stop_string():
    model = tiny_model("gpt2")
    encode = lambda text: [int(word) for word in text.split()]  # noqa: E731
    model.tokenizer = SimpleNamespace(
        eod_id=None,
        encode=encode,
        prompt=encode,
        decode=lambda ids: " ".join(map(str, ids)),
    )
    [free] = generate(model, ["1 2 3"], max_tokens=20, temperature=0)
    words = free.split()
    [ended] = generate(model, ["1 2 3"], max_tokens=20, temperature=0, stop=[words[5]])
    assert ended == free[: free.index(words[5])]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompts": [[1] * 32]}, "the context is 32"),
        ({"prompts": [[1] * 30], "max_tokens": 5}, "try max_tokens=2"),
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"prompts": [[500]]}, "beyond model.vocab_size=500"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"sampling": Sampling(-1)}, "temperature=-1"),
        ({"sampling": Sampling(top_p=0)}, "top_p=0"),
        ({"sampling": Sampling(repetition_penalty=0)}, "repetition_penalty=0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_generated_is_refused(wrong, says):
    asked = {"prompts": PROMPTS, "max_tokens": 4, "sampling": Sampling()} | wrong
    with pytest.raises(ConfigError, match=says):
        generate_ids(tiny_model("gpt2"), asked.pop("prompts"), **asked)
