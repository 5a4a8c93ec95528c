"""Which sentences make a sample, beside megatron-core's own build_mapping; and a run's rows."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mlm_jax.data.builtin import builtin_corpus
from mlm_jax.data.corpora import docstrings
from mlm_jax.data.corpora.sources import Package
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.indexed_writer import IndexedWriter
from mlm_jax.data.objectives.bert_samples import sample_index
from mlm_jax.data.pipeline import open_data
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.door import from_dict
from mlm_jax.errors import ConfigError, DataError

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(195))]


def documents(seed=0, n=60):
    """Lengths of sentences, of which some documents have none, or one that is too long."""
    rng = np.random.default_rng(seed)
    begins = np.concatenate([[0], np.cumsum(rng.integers(0, 9, n))]).astype(np.int64)
    lengths = rng.integers(1, 40, begins[-1]).astype(np.int32)
    lengths[rng.random(len(lengths)) < 0.01] = 600
    return lengths, begins


@pytest.mark.parametrize("fewest", [1, 2])
def test_samples_are_megatrons(fewest):
    theirs = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    for seed in range(5):
        lengths, begins = documents(seed, 300)
        longest = 3 + 40 * seed
        ours = sample_index(lengths, begins, longest=longest, fewest=fewest, seed=seed)
        golden = theirs.build_mapping(
            begins, lengths, 1, 2**40, longest, 0.1, seed, False, fewest
        )  # in the order of their own shuffle
        np.testing.assert_array_equal(in_a_row(ours), in_a_row(golden))


def in_a_row(samples):
    return samples[np.argsort(samples[:, 0])]


def test_samples_are_all_sentences_of_usable_documents_once():
    lengths, begins = documents()
    found = sample_index(lengths, begins, longest=61, fewest=2, seed=1)
    seen = [i for first, end, _ in found.tolist() for i in range(first, end)]
    spans = [range(a, b) for a, b in pairwise(begins.tolist())]
    usable = [s for s in spans if len(s) >= 2 and lengths[s].max() <= 512]
    assert seen == [i for s in usable for i in s]
    assert (found[:, 1] - found[:, 0]).min() >= 2
    assert 0 < (found[:, 2] < 61).mean() < 0.3


@pytest.fixture
def written(tmp_path):
    """A run over 40 documents of sentences, and what their tokens are."""
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    rng = np.random.default_rng(0)
    with IndexedWriter(tmp_path / "text", np.int32) as writer:
        for _ in range(40):
            writer.add_document(
                [rng.integers(5, 200, rng.integers(3, 20)) for _ in range(rng.integers(2, 9))]
            )

    def run(data=None, model=None, train=None):
        return from_dict({
            "model": {"family": "bert", "token_types": 2, "seq_len": 48, "vocab_size": 200,
                      **(model or {})},
            "data": {"path": str(tmp_path / "text"),
                     "tokenizer": str(tmp_path / "vocab.txt"), "split": "9,1", **(data or {})},
            "train": {"global_batch_size": 4, "steps": 10, **(train or {})},
        })  # fmt: skip

    return run


def test_rows_of_a_run(written):
    data = open_data(written())
    batch = data.train.batch(0)
    assert {name: (x.dtype.name, x.shape) for name, x in batch.items()} == {
        "tokens": ("int32", (4, 48)), "targets": ("int32", (4, 48)), "types": ("int32", (4, 48)),
        "segments": ("int32", (4, 48)), "weights": ("float32", (4, 48)), "swapped": ("int32", (4,)),
    }  # fmt: skip
    real = batch["segments"] == 1
    assert (batch["tokens"][~real] == 0).all()
    assert (batch["tokens"][:, 0] == 2).all()
    assert (np.diff(batch["segments"]) <= 0).all()  # padding is at the end
    assert not batch["weights"][~real].any()
    assert (batch["weights"].sum(1) >= 1).all()
    plain = open_data(written(model={"order_head": False, "token_types": 0})).train.batch(0)
    assert plain.keys() == {"tokens", "targets", "weights", "segments"}


def test_a_sample_is_a_function_of_seed_and_number(written):
    run = written()
    one, other = open_data(run).train, open_data(written(train={"steps": 99})).train
    n = one.n_samples
    for k in (0, 3, n // 4 + 1, n):  # in the first epoch, and beyond
        for name, x in one.batch(k).items():
            np.testing.assert_array_equal(x, other.batch(k)[name])

    def rows(batches, first):
        return [batches.stream.row(i) for i in range(first, first + n)]

    def unmasked(rows):
        return sorted(np.where(r["weights"] > 0, r["targets"], r["tokens"]).sum() for r in rows)

    first, second = rows(one, 0), rows(one, n)
    assert [r["tokens"].tolist() for r in first] != [r["tokens"].tolist() for r in second]
    whole = written(model={"seq_len": 400})  # nothing is shortened: epochs have the same sentences
    stream = open_data(whole).train
    n = stream.n_samples
    assert unmasked(rows(stream, 0)) == unmasked(rows(stream, n))
    elsewhere = open_data(written(train={"seed": 1})).train.batch(0)
    assert (elsewhere["tokens"] != one.batch(0)["tokens"]).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": {"family": "gpt", "token_types": 0}, "data": {"objective": "masked"}},
            "not for model.family='gpt'; try causal",
        ),
        ({"data": {"objective": "causal"}}, "not for model.family='bert'; try masked"),
        ({"data": {"epochs": "together"}}, "data.epochs='together' does nothing"),
        ({"data": {"cross_document_attention": True}}, "cross_document_attention=True does"),
        ({"data": {"tokenizer": None}}, "data.objective='masked' needs data.tokenizer"),
        ({"data": {"path": None, "tokenizer": None, "split": "969,30,1", "builtin": "prose"}},
         "not for data.objective='masked'; try sentences"),
        ({"model": {"seq_len": 4}}, "model.seq_len=4 leaves no room"),
        ({"model": {"token_types": 1}}, "token_types=1"),
        ({"model": {"attention": "cudnn", "dtype": "bfloat16", "head_dim": 32}},
         "is given no mask of padding"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(written, settings, message):
    with pytest.raises(ConfigError, match=message):
        written(**settings)


def test_files_that_cannot_be(written, tmp_path):
    with IndexedWriter(tmp_path / "whole", np.int32) as writer:
        for _ in range(20):
            writer.add_document([np.arange(5, 30)])
    with pytest.raises(DataError, match=r"a document has 1 sentences; .*--split_sentences"):
        open_data(written(data={"path": str(tmp_path / "whole")}))
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "vocab.txt").write_text("[UNK]\n[CLS]\nw")
    with pytest.raises(DataError, match="no token for sep, mask, pad, which BERT needs"):
        open_data(written(data={"tokenizer": str(tmp_path / "gpt" / "vocab.txt")}))
    with pytest.raises(DataError, match="smaller than the tokenizer's 200"):
        open_data(written(model={"vocab_size": 150}))
    with IndexedWriter(tmp_path / "other", np.int32) as writer:
        for _ in range(20):
            writer.add_document([np.arange(195, 205), np.arange(5, 30)])
    with pytest.raises(DataError, match="token id 200, beyond"):
        open_data(written(data={"path": str(tmp_path / "other")}))


def test_a_builtin_corpus_of_sentences(tmp_path, monkeypatch):
    sentence = "The number {} is one of the numbers that are read here. It is followed by {}."
    word = lambda i: "".join("abcdefghij"[int(digit)] for digit in f"{i:02}")  # noqa: E731
    folder = tmp_path / "package"
    folder.mkdir()
    for i in range(80):
        text = "\n\n".join(
            sentence.format(word(i) + "x" + word(j), word(j) + "y" + word(i)) for j in range(5)
        )
        (folder / f"m{i}.py").write_text(f'"""{text}"""\n')
    package = Package("Python", "3", "PSF-2.0", folder)
    monkeypatch.setattr(docstrings, "DOCUMENTED", ())
    monkeypatch.setattr(docstrings, "python_itself", lambda: package)
    monkeypatch.setenv("MLM_JAX_CACHE", str(tmp_path / "cache"))
    run = from_dict({
        "model": {"family": "bert", "token_types": 2, "seq_len": 64, "vocab_size": 400},
        "train": {"global_batch_size": 4},
    })  # fmt: skip
    data = open_data(run)
    batch, tokenizer = data.train.batch(0), data.tokenizer
    assert {"cls", "sep", "mask", "pad"} <= tokenizer.special.keys()
    words = np.where(batch["weights"] > 0, batch["targets"], batch["tokens"])[0]
    text = tokenizer.decode(words[batch["segments"][0] == 1])
    assert text.startswith("[CLS] ")
    assert "[SEP] " in text
    assert " is followed by" in text
    assert (Path(tmp_path) / "cache").exists()
    indexed = IndexedDataset(data.corpus.train)
    assert len(indexed) == 10 * (len(indexed.documents) - 1)
    the = tokenizer.encode("The")
    assert the == tokenizer.encode("of the")[-len(the) :]  # a word is one, where it stands
    assert not tokenizer.continues_word()[the[0]]


@pytest.mark.slow
def test_the_corpus_of_sentences_has_its_known_size(tmp_path, monkeypatch):
    monkeypatch.setenv("MLM_JAX_CACHE", str(tmp_path))
    found = builtin_corpus("sentences")
    indexed = IndexedDataset(found.train)
    assert 900 < len(indexed.documents) - 1 < 2000
    assert 10 < len(indexed) / len(indexed.documents) < 40
    assert load_tokenizer(found.tokenizer).vocab_size == 2048
