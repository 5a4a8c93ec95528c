import dataclasses
import lzma
import platform
import subprocess
import sys

import numpy as np
import pytest

from mlm_jax.data import builtin
from mlm_jax.data.builtin import FIM_TOKENS, builtin_corpus, cache_folder
from mlm_jax.data.corpora import sources
from mlm_jax.data.corpora.python import harvest, is_code
from mlm_jax.data.corpora.sources import Package, folded, is_held_out, read_sources, unique
from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.errors import DataError

CODE = "def double_{0}(number):\n\treturn number + number  # twice the number {0}\n\n\n" * 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The real one, built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield builtin_corpus()


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """A standard library of 80 small modules, and an empty cache at tmp_path / "cache"."""
    for number in range(80):
        file = tmp_path / "stdlib" / f"package{number % 3}" / f"module{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(CODE.format(number))
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": tmp_path / "stdlib"})
    monkeypatch.setenv("MLM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "stdlib"


def test_the_corpus_has_its_known_size(corpus):
    assert (corpus.kind, corpus.objective) == ("python", "causal")
    assert corpus.licence == f"Python {platform.python_version()}: PSF-2.0"
    assert 300 < corpus.documents < 450  # sizes are stable across versions of Python, bytes are not
    assert 5.5e6 < corpus.train_bytes < 9e6
    assert 0.03 < corpus.valid_bytes / corpus.train_bytes < 0.1


def test_every_document_is_a_file_closed_by_eod(corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (2048, 0)
    train, valid = IndexedDataset(corpus.train), IndexedDataset(corpus.valid)
    assert len(train) + len(valid) == corpus.documents
    for indexed, size in ((train, corpus.train_bytes), (valid, corpus.valid_bytes)):
        tokens = np.concatenate([indexed.tokens(i) for i in range(len(indexed))])
        assert np.count_nonzero(tokens == 0) == len(indexed)
        assert all(indexed.tokens(i)[-1] == 0 for i in range(len(indexed)))
        assert tokenizer.token_bytes()[tokens].sum() == size
        assert 2.8 < size / len(tokens) < 3.8  # bytes a token
    assert is_code(tokenizer.decode(valid.tokens(0)[:-1]))


def test_baselines_are_what_they_say(corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    train, valid = (
        np.concatenate([indexed.tokens(i) for i in range(len(indexed))]).tolist()
        for indexed in map(IndexedDataset, (corpus.train, corpus.valid))
    )
    seen = np.ones(2048)
    np.add.at(seen, train, 1)
    bits = -sum(np.log2(seen[token] / seen.sum()) for token in valid) / corpus.valid_bytes
    assert corpus.baselines["unigram"] == pytest.approx(bits)
    text = tokenizer.decode(valid).replace("<|endoftext|>", "").encode()
    assert len(text) == corpus.valid_bytes
    xz = 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert corpus.baselines["xz"] == pytest.approx(xz, rel=0.01)
    assert 1.5 < corpus.baselines["xz"] < 2.0 < 2.8 < corpus.baselines["unigram"] < 3.4


def test_a_second_call_finds_the_first(stdlib, monkeypatch, capfd):
    first = builtin_corpus(vocab_size=300)
    monkeypatch.setattr(builtin, "build", None)
    assert builtin_corpus(vocab_size=300) == first
    assert [p.parent for p in (first.train, first.valid)] == [first.tokenizer.parent] * 2
    assert list(first.tokenizer.parents[1].iterdir()) == [first.tokenizer.parent]
    assert capfd.readouterr() == ("", "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.documents = 1


def test_another_vocabulary_or_python_is_another_corpus(stdlib, monkeypatch):
    folders = [builtin_corpus(vocab_size=size, fim=fim).train.parent
               for size, fim in ((300, False), (301, False), (300, True))]  # fmt: skip
    monkeypatch.setattr(sources.platform, "python_version", lambda: "3.99.0")
    folders.append(builtin_corpus(vocab_size=300).train.parent)
    assert len({*folders}) == 4


def test_middles_to_fill_in_change_no_id_but_the_last_four(stdlib):
    plain, fim = builtin_corpus(vocab_size=300), builtin_corpus(vocab_size=300, fim=True)
    of_plain, of_fim = load_tokenizer(plain.tokenizer), load_tokenizer(fim.tokenizer)
    assert of_fim.vocab_size == of_plain.vocab_size == 300
    assert [of_fim.id_of(token) for token in FIM_TOKENS] == [296, 297, 298, 299]
    assert [of_fim.decode([i]) for i in range(296)] == [of_plain.decode([i]) for i in range(296)]
    assert of_fim.eod_id == 0
    assert of_fim.encode("a<|fim_middle|>b")[1:2] == [297]
    assert not {296, 297, 298, 299} & {*IndexedDataset(fim.train).tokens(0).tolist()}


def test_a_text_that_spells_out_a_special_token_is_left_out(stdlib):
    for number, token in enumerate(("<|endoftext|>", "<|fim_pad|>", "<|im_end|>")):
        (stdlib / f"spelt{number}.py").write_text(CODE.format(number) + f"token = {token!r}\n")
    assert builtin_corpus(vocab_size=300).documents == 82
    assert builtin_corpus(vocab_size=300, fim=True).documents == 81


def test_what_there_is_none_of_is_refused():
    wanted = "no built-in corpus 'pyhton'; there are python, prose, conversations, en-fr, en-de"
    with pytest.raises(DataError, match=wanted):
        builtin_corpus("pyhton")
    with pytest.raises(DataError, match="'en-fr' has no middles to fill in; try python"):
        builtin_corpus("en-fr", fim=True)


@pytest.mark.parametrize(
    ("kind", "fim", "least"),
    [("python", False, 257), ("python", True, 261), ("conversations", False, 259)],
)
def test_a_vocabulary_without_room_for_all_bytes_is_refused(kind, fim, least):
    with pytest.raises(DataError, match=f"vocab_size={least - 1} .* {kind!r}; try {least} or more"):
        builtin_corpus(kind, least - 1, fim=fim)


def test_nothing_half_stays_after_a_failure(stdlib, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "baselines", interrupted)  # when nearly everything is written
        with pytest.raises(KeyboardInterrupt):
            builtin_corpus(vocab_size=300)
    assert not list((tmp_path / "cache").iterdir())
    assert builtin_corpus(vocab_size=300).documents == 80


def test_two_at_once_agree(stdlib, tmp_path, monkeypatch):
    build, other = builtin.build, []

    def slow(*args):
        build(*args)
        monkeypatch.setattr(builtin, "build", build)
        other.append(builtin_corpus(vocab_size=300))  # a second starts and finishes meanwhile

    monkeypatch.setattr(builtin, "build", slow)
    assert builtin_corpus(vocab_size=300) == other[0]
    assert list((tmp_path / "cache").iterdir()) == [other[0].train.parent]


def test_a_python_without_sources_is_refused(stdlib, tmp_path, monkeypatch):
    for number in range(31):
        (stdlib / f"package{number % 3}" / f"module{number}.py").unlink()
    with pytest.raises(
        DataError, match=r"python, from .*stdlib: 49 usable .* fewer than 50; .* set data\.path"
    ):
        builtin_corpus(vocab_size=300)
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": "/nowhere.zip"})
    with pytest.raises(DataError, match=r"nowhere\.zip: 0 usable"):
        builtin_corpus(vocab_size=300)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_refused(stdlib, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"cache/builtin.*cannot be written.*set MLM_JAX_CACHE"):
        builtin_corpus(vocab_size=300)


def test_cache_folder(monkeypatch, tmp_path):
    for name in ("MLM_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "mlm_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_folder()) == "/xdg/mlm_jax"
    monkeypatch.setenv("MLM_JAX_CACHE", "/own")
    assert str(cache_folder()) == "/own"


def test_which_files_are_taken(tmp_path):
    code = CODE.format(1)
    taken = {"a.py": code, "b/c.py": code + "\n", "b/testing/d.py": code + "x = 1\n"}
    left = {
        "test/e.py": code + "2", "b/tests/f.py": code + "3", "site-packages/g.py": code + "4",
        "config-3.11-x86/h.py": code + "5", "_sysconfigdata_m.py": code + "6", "notes.txt": code,
        "short.py": "x = 1\n", "long.py": CODE.format(1) * 900, "test_a.py": code + "7",
        "broken.py": code + "def\n", "z.py": code + "# \udcff\n", "a_test.py": code + "8",
    }  # fmt: skip
    for name, text in (taken | left | {"again.py": code, "table.py": "x = 1234\n" * 50}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "dead.py").symlink_to("nowhere.py")
    read = [source.file for source in read_sources(tmp_path)]
    assert read == sorted([*taken, "again.py", "table.py"])
    found = dict(harvest([Package("Python", "3", "PSF-2.0", tmp_path)]))
    assert found == {name: text.replace("\t", "    ") for name, text in taken.items()}


def test_is_code():
    assert is_code("from here import there\n")
    assert is_code(f"words = '{'w ' * 190}'\n")
    assert not is_code(f"words = '{'w ' * 200}'\n")  # a line of more than 400 characters
    assert not is_code("x = [1, 2, 3, 4, 5, 6, 7, 8]\n")  # a table


def test_texts_that_read_alike_are_one():
    assert folded("Don't “Panic”, 42!") == "dontpanic"
    assert unique(["A b.", "a B!", "é", "E"], key=folded) == ["A b.", "é", "E"]


def test_a_file_is_held_out_by_its_name():
    held_out = [number for number in range(2000) if is_held_out(f"module{number}.py")]
    assert held_out[:3] == [8, 11, 41]
    assert 60 < len(held_out) < 140


def test_importing_the_data_room_does_not_import_jax():
    code = "import mlm_jax.data.builtin, mlm_jax.data.sampling, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
