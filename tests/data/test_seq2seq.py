"""Rows of a model that reads one text and writes another, from files and built-in corpora."""

import json

import pytest

from mlm_jax.data.objectives.t5_spans import noise_of, spans_within
from mlm_jax.data.pipeline import open_data
from mlm_jax.data.preprocess.encoding import write_documents
from mlm_jax.data.tokenizer.fast import FastTokenizer
from mlm_jax.data.tokenizer.training import train_bpe
from mlm_jax.door import from_dict
from mlm_jax.errors import ConfigError, DataError

TEXTS = [f"the number {i} is what comes after {i - 1}, before {i + 1}" for i in range(300)]
NAMES = [f"<extra_id_{i}>" for i in range(8)]
MODEL = {
    "family": "t5", "positions": "relative", "norm": "rmsnorm", "bias": False, "seq_len": 48,
    "target_len": 16, "vocab_size": 512, "n_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seq2seq")
    backend = train_bpe(TEXTS, 350).backend
    backend.add_special_tokens(["<pad>", *NAMES])
    tokenizer = FastTokenizer(backend, {"pad_token": "<pad>"})
    tokenizer.save(folder / "tokenizer")
    write_documents(TEXTS, tokenizer, folder / "text", append_eod=True)
    pairs = [{"source": text, "target": text[::-1][:20]} for text in TEXTS]
    pairs[0]["source"] *= 20
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def open_run(folder, objective="spans", model=None, **data):
    path = {"spans": folder / "text", "pairs": folder / "pairs.jsonl"}[objective]
    return open_data(from_dict({
        "model": MODEL | (model or {}), "train": {"global_batch_size": 8},
        "data": {"path": str(path), "tokenizer": str(folder / "tokenizer"),
                 "objective": objective, **data},
    }))  # fmt: skip


@pytest.mark.parametrize(("S", "T"), [(511, 114), (47, 16), (100, 5), (3, 40), (10, 3)])
def test_texts_are_as_long_as_both_sides_hold(S, T):
    n, count = spans_within(S, T)
    fits = lambda n: (  # noqa: E731
        n - noise_of(n)[0] + noise_of(n)[1] <= S and sum(noise_of(n)) + 1 <= T
    )
    assert fits(n)
    assert not any(fits(more) for more in range(n + 1, 3 * S))
    assert count == noise_of(n)[1]


def test_the_papers_lengths():
    assert spans_within(511, 114)[0] == 568  # Raffel et al.: 512 tokens read, 114 written


def test_spans_and_what_is_left_are_the_text(folder):
    data = open_run(folder)
    tokenizer, batch = data.tokenizer, data.train.batch(3)
    ids = [tokenizer.id_of(name) for name in NAMES]
    eos, pad = tokenizer.special["eos"], tokenizer.special["pad"]
    samples = data.train.stream.epoch(0).samples
    for row, number in enumerate(range(24, 32)):
        read = batch["tokens"][row][batch["segments"][row] == 1].tolist()
        written = batch["targets"][row][batch["weights"][row] == 1].tolist()
        assert read[-1] == written[-1] == eos
        assert batch["decoder_tokens"][row][: len(written)].tolist() == [pad, *written[:-1]]
        text = []
        for token in read[:-1]:
            if token in ids:
                begin = written.index(token) + 1
                ends = [i for i, t in enumerate(written) if i >= begin and t in ids]
                end = min(ends, default=len(written) - 1)
                text += written[begin:end]
            else:
                text.append(token)
        assert text == samples[number].tolist()
    again = open_run(folder).train.batch(3)
    assert all((batch[name] == again[name]).all() for name in batch)
    later = data.train.stream.row(data.train.n_samples + 24)  # another epoch draws anew
    assert (later["tokens"] != batch["tokens"][0]).any()


def test_a_pair_is_read_and_written(folder):
    data = open_run(folder, "pairs")
    tokenizer, rows = data.tokenizer, [data.train.stream.row(i) for i in range(200)]
    eos, cut = tokenizer.special["eos"], 0
    for row in rows:
        read = row["tokens"][row["segments"] == 1].tolist()
        written = row["targets"][row["weights"] == 1].tolist()
        assert read[-1] == eos
        source, target = tokenizer.decode(read[:-1]), tokenizer.decode(written[:-1])
        if len(read) == 48:
            cut += 1
        elif written[-1] == eos:
            assert target == source.removesuffix("\n")[::-1][:20]
        assert row["decoder_tokens"][0] == tokenizer.special["pad"]
    assert cut <= 1
    assert len({row["tokens"].tobytes() for row in rows}) == 200


def test_nonsense_is_refused(folder):
    with pytest.raises(DataError, match=r"tokenizer has 8 names for places.*make seq_len smaller"):
        open_run(folder, model={"seq_len": 256, "target_len": 256})
    with pytest.raises(DataError, match="hold no text"):
        open_run(folder, model={"seq_len": 2, "target_len": 2})
    with pytest.raises(ConfigError) as why:
        from_dict({
            "model": MODEL, "data": {"objective": "causal", "cross_document_attention": True},
        })  # fmt: skip
    assert "data.objective='causal' is not for model.family='t5'; try spans or pairs" in str(why)
    assert "data.cross_document_attention=True does nothing" in str(why)
    with pytest.raises(ConfigError, match=r"data\.objective='spans' is not for model.family='gpt'"):
        from_dict({"data": {"objective": "spans"}})
