"""Building: Megatron's bytes for any number of workers; what is left when it cannot go on."""

import json
import multiprocessing
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from mlm_jax.data.indexed import IndexedDataset
from mlm_jax.data.preprocess import encoding, progress, unfinished, workers
from mlm_jax.data.preprocess.build import build
from mlm_jax.data.preprocess.encoding import Counts, write_documents
from mlm_jax.data.preprocess.inputs import chunks
from mlm_jax.data.preprocess.progress import Stopped
from mlm_jax.data.preprocess.sentences import sentences
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.data.tokenizer.fast import FastTokenizer
from mlm_jax.errors import ConfigError, DataError, MlmJaxError

GOLDEN = Path(__file__).parents[2] / "golden" / "data"
TOKENIZER = GOLDEN / "tokenizer"
PROSE = GOLDEN / "prose_a.jsonl"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture
def source(tmp_path) -> Path:
    """Forty short documents."""
    lines = (json.dumps({"text": f"document {n} " * (n % 7), "n": str(n)}) for n in range(40))
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "in.jsonl"


def equals_golden(prefix: Path, name: str) -> bool:
    return all(
        Path(f"{prefix}_text_document.{kind}").read_bytes()
        == (GOLDEN / f"{name}_text_document.{kind}").read_bytes()
        for kind in ("bin", "idx")
    )


@pytest.mark.smoke
@pytest.mark.parametrize(("chunk", "part_bytes"), [(1, None), (50_000, 40_000), (10**6, 10**6)])
@pytest.mark.parametrize("name", ["prose_a", "prose_b"])
def test_equals_megatron(name, chunk, part_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", chunk)
    file = GOLDEN / f"{name}.jsonl"
    out = tmp_path / "new" / "out"
    counts = build([file], TOKENIZER, out, append_eod=True, part_bytes=part_bytes)
    assert equals_golden(out, name)
    assert len(list(out.parent.iterdir())) == 2
    texts = [json.loads(line)["text"] for line in file.open()]
    tokens = (GOLDEN / f"{name}_text_document.bin").stat().st_size // 2
    assert counts == Counts(len(texts), tokens, sum(len(text.encode()) for text in texts))


@pytest.mark.multiprocess
@pytest.mark.parametrize("part_bytes", [15_000, 150_000])
def test_workers_change_nothing(part_bytes, tmp_path):
    build([PROSE], TOKENIZER, tmp_path / "out", append_eod=True, workers=2, part_bytes=part_bytes)
    assert equals_golden(tmp_path / "out", "prose_a")
    assert len(list(tmp_path.iterdir())) == 2
    assert not multiprocessing.active_children()


def test_inputs_follow_each_other(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes("one é\r\n\ndocument".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"body": "x"}\r\n\n{"n": 1, "body": ""}'.encode())
    names = [tmp_path / "a.txt", str(tmp_path / "b.jsonl"), tmp_path / "a.txt"]
    counts = build(names, TOKENIZER, tmp_path / "out", json_keys=["body"])
    indexed = IndexedDataset(tmp_path / "out_body_document")
    assert tokenizer.decode(indexed.tokens(0)) == "one é\r\n\ndocument"
    assert tokenizer.decode(indexed.tokens(1)) == "x"
    assert indexed.documents.tolist() == [0, 1, 2, 2, 3]
    assert counts == Counts(4, indexed.n_tokens, 35)
    assert indexed.dtype == np.uint16


def test_small_files_share_a_part(tokenizer, tmp_path, monkeypatch):
    texts = [f"text {n}" for n in range(600)]
    for n, text in enumerate(texts):
        (tmp_path / f"{n:03}.txt").write_text(text)
    written = stop_after(monkeypatch, 10**6, Stopped())
    build([tmp_path / "*.txt"], TOKENIZER, tmp_path / "out")
    assert len(written) == 3
    indexed = IndexedDataset(tmp_path / "out_text_document")
    assert [tokenizer.decode(indexed.tokens(n)) for n in range(600)] == texts


def test_keys_are_written_in_one_pass(source, tokenizer, tmp_path):
    both = build([source], TOKENIZER, tmp_path / "both", json_keys=("text", "n"), part_bytes=100)
    each = [build([source], TOKENIZER, tmp_path / "each", json_keys=[k]) for k in ("text", "n")]
    assert both.tokens == sum(counts.tokens for counts in each)
    assert both.documents == 40
    for key in ("text", "n"):
        for kind in ("bin", "idx"):
            one, other = (tmp_path / f"{p}_{key}_document.{kind}" for p in ("both", "each"))
            assert one.read_bytes() == other.read_bytes()


def plain_encode(text, tokenizer, split, append_eod) -> list[list[int]]:
    """Sequences of a document, as Megatron-LM's preprocess_data.py describes them."""
    pieces = sentences(text) if split else [text]
    found = [ids for ids in map(tokenizer.encode, pieces) if ids]
    if append_eod and found:
        found[-1] = found[-1] + [tokenizer.eod_id]
    return found


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_sequences_are_documents_or_sentences(split, append_eod, tokenizer, tmp_path):
    texts = ["", "One. Two! Three?", "  \n\n ", "No stop", "A.\n\nB.", ""]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    options = {"split_sentences": split, "append_eod": append_eod}
    build([tmp_path / "in.jsonl"], TOKENIZER, tmp_path / "out", part_bytes=30, **options)
    indexed = IndexedDataset(tmp_path / f"out_text_{'sentence' if split else 'document'}")
    expected = [plain_encode(text, tokenizer, split, append_eod) for text in texts]
    assert indexed.documents.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert [indexed.tokens(i).tolist() for i in range(len(indexed))] == [
        sequence for document in expected for sequence in document
    ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two!  Three?\nFour", ["One.", "Two!", "Three?", "Four"]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("Dr. J. S. Bach met Mr. Smith, e.g. Monday.", None),
        ("It was I. We left.", ["It was I.", "We left."]),
        ("Version 3.11 of a.b costs 5.00 at x.com today", None),
        ("and so on... but not here", None),
        ("Wait... What?! Yes.", ["Wait...", "What?!", "Yes."]),
        ("A title\n\nA paragraph\nof two lines", ["A title", "A paragraph\nof two lines"]),
        ("\u4f60\u597d\u3002\u518d\u89c1\uff01", ["\u4f60\u597d\u3002", "\u518d\u89c1\uff01"]),
        (" \n\n\t ", []),
    ],
)
def test_sentences(text, parts):
    assert sentences(text) == ([text] if parts is None else parts)


def test_write_documents_and_the_vocabulary_decide_the_dtype(tmp_path):
    large = FastTokenizer(
        tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 65_499}, unk_token="a"))
    )
    large.save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("b")
    build([tmp_path / "a.txt"], tmp_path / "tokenizer", tmp_path / "out")
    write_documents(["b"], large, tmp_path / "same", append_eod=False)
    for prefix in ("out_text_document", "same"):
        indexed = IndexedDataset(tmp_path / prefix)
        assert indexed.dtype == np.int32
        assert indexed.tokens(0).tolist() == [65_499]


def test_an_id_outside_the_dtype_is_refused(tokenizer, tmp_path):
    class Liar:
        vocab_size, eod_id = 100, None

        def encode_many(self, texts):
            return [np.array([70_000], np.uint32) for _ in texts]

    with pytest.raises(DataError, match="token 70000 does not fit uint16"):
        write_documents(["x"], Liar(), tmp_path / "out", append_eod=False)
    assert not list(tmp_path.iterdir())


# What cannot be built


def test_a_bad_line_stops_or_is_counted(source, tmp_path, caplog):
    content = source.read_text().splitlines()
    content[9:9], content[30:30] = ["bad"] * 7, ["worse"]
    source.write_text("\n".join(content))
    with pytest.raises(DataError) as why:
        build([source], TOKENIZER, tmp_path / "out")
    assert str(why.value).startswith(f"{source}, line 10: not JSON")
    assert "--on_error skip" in str(why.value)
    assert list(tmp_path.iterdir()) == [source]
    counts = build([source], TOKENIZER, tmp_path / "out", on_error="skip")
    assert (counts.documents, counts.skipped) == (40, 8)
    assert f"skipped: {source}, line 10: not JSON" in caplog.text
    assert "(7 more near it)" in caplog.text


@pytest.mark.multiprocess
def test_an_error_in_a_worker_is_one_message_and_the_rest_is_kept(source, tmp_path):
    source.write_text(source.read_text() + "bad\n")
    with pytest.raises(DataError, match=r"in\.jsonl, line 41: not JSON"):
        build([source], TOKENIZER, tmp_path / "out", workers=2, part_bytes=200)
    assert not multiprocessing.active_children()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.building"]
    counts = build([source], TOKENIZER, tmp_path / "out", on_error="skip", part_bytes=200)
    assert (counts.documents, counts.skipped) == (40, 1)


def test_what_a_tokenizer_raises_is_one_message(source, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise Exception("PreTokenizer: what it says")

    monkeypatch.setattr(FastTokenizer, "encode_many", fail)
    with pytest.raises(
        MlmJaxError, match="tokenizer failed: Exception: PreTokenizer: what it says"
    ) as why:
        build([source], TOKENIZER, tmp_path / "out")
    assert type(why.value) is MlmJaxError


@pytest.mark.multiprocess
def test_a_worker_that_dies_is_told(source, tmp_path, monkeypatch):
    def kill(_: object) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    monkeypatch.setattr(progress.Progress, "show", kill)
    with pytest.raises(MlmJaxError, match=r"a worker ended while .*no memory left") as why:
        build([source], TOKENIZER, tmp_path / "out", workers=2, part_bytes=500)
    assert type(why.value) is MlmJaxError
    assert not multiprocessing.active_children()
    assert not list(tmp_path.glob("out_*"))


def test_no_documents_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text("bad\n")
    for names, said in (([], ""), (["empty.jsonl"], ""), (["bad.jsonl"], r" \(1 were skipped\)")):
        files = [tmp_path / name for name in names]
        with pytest.raises(DataError, match=f"out_text_document: there are no documents.*{said}"):
            build(files, TOKENIZER, tmp_path / "out", on_error="skip")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_existing_output_is_not_touched(kind, tmp_path):
    there = tmp_path / f"out_text_document.{kind}"
    there.write_text("precious")
    with pytest.raises(DataError, match=f"{there}: already exists"):
        build([PROSE], TOKENIZER, tmp_path / "out")
    assert there.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [there]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/out\.building: cannot be written"):
        build([PROSE], TOKENIZER, tmp_path / "file" / "out")


def test_settings_that_contradict_themselves_are_refused_at_once(tmp_path):
    with pytest.raises(ConfigError) as why:
        build(
            [PROSE], TOKENIZER, tmp_path / "out", on_error="go", max_document_bytes=0,
            json_keys=("a", "a"),
        )  # fmt: skip
    said = str(why.value)
    assert all(name in said for name in ("'go'", "max_document_bytes=0", "=a a"))
    with pytest.raises(ConfigError, match="workers=0"):
        build([PROSE], TOKENIZER, tmp_path / "out", workers=0)


def test_append_eod_needs_one(tmp_path):
    without = FastTokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    without.save(tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"append_eod needs .* <\|endoftext\|>"):
        build([PROSE], tmp_path / "tokenizer", tmp_path / "out", append_eod=True)


# Going on


def stop_after(monkeypatch, n_parts: int, error: BaseException) -> list[str]:
    """Raises where the part after n_parts begins; returns the parts written, as they come."""
    written, write_part = [], encoding.write_part

    def stopping(part, *rest):
        if len(written) == n_parts:
            raise error
        written.append(part.name)
        return write_part(part, *rest)

    monkeypatch.setattr(workers, "write_part", stopping)
    return written


def test_what_is_finished_is_not_done_again(source, tmp_path, monkeypatch):
    build([source], TOKENIZER, tmp_path / "whole", part_bytes=200)
    first = stop_after(monkeypatch, 4, Stopped())
    with pytest.raises(Stopped):
        build([source], TOKENIZER, tmp_path / "out", part_bytes=200)
    assert not list(tmp_path.glob("out_*"))
    second = stop_after(monkeypatch, 10**6, Stopped())
    build([source], TOKENIZER, tmp_path / "out", part_bytes=200)
    assert len(first) == 4
    assert second
    assert not {*first} & {*second}
    assert not (tmp_path / "out.building").exists()
    for kind in ("bin", "idx"):
        one, other = (tmp_path / f"{p}_text_document.{kind}" for p in ("out", "whole"))
        assert one.read_bytes() == other.read_bytes()


def test_what_was_skipped_is_looked_at_again_where_it_would_count(source, tmp_path, monkeypatch):
    source.write_text("bad\n" + source.read_text())
    stop_after(monkeypatch, 4, Stopped())
    with pytest.raises(Stopped):
        build([source], TOKENIZER, tmp_path / "out", part_bytes=200, on_error="skip")
    stop_after(monkeypatch, 10**6, Stopped())
    with pytest.raises(DataError, match="line 1: not JSON"):
        build([source], TOKENIZER, tmp_path / "out", part_bytes=200)
    again = stop_after(monkeypatch, 10**6, Stopped())
    counts = build([source], TOKENIZER, tmp_path / "out", part_bytes=200, on_error="skip")
    assert (counts.documents, counts.skipped) == (40, 1)
    assert len(again) == len(range(0, source.stat().st_size, 200)) - 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"append_eod": True}, "append_eod was False and is True"),
        ({"json_keys": ("text", "n")}, r"json_keys was \['text'\] and is \['text', 'n'\]"),
        ({"split_sentences": True}, "split_sentences was False and is True"),
        ({"tokenizer": "bytes"}, "tokenizer was '[0-9a-f]+' and is"),
    ],
    ids=str,
)
def test_parts_of_another_build_are_not_mixed_in(options, said, source, tmp_path, monkeypatch):
    stop_after(monkeypatch, 4, Stopped())
    arguments = {"inputs": [source], "tokenizer": TOKENIZER, "output": tmp_path / "out"}
    with pytest.raises(Stopped):
        build(**arguments, part_bytes=200)
    before = sorted((tmp_path / "out.building").iterdir())
    with pytest.raises(DataError, match=rf"out\.building has 4 finished parts .*{said}"):
        build(**(arguments | options), part_bytes=200)
    assert sorted((tmp_path / "out.building").iterdir()) == before


def test_an_input_that_changed_is_read_again_and_the_others_are_not(tmp_path, monkeypatch):
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for file in files:
        file.write_text('{"text": "old"}\n')
    stop_after(monkeypatch, 2, Stopped())
    with pytest.raises(Stopped):
        build(files, TOKENIZER, tmp_path / "out", part_bytes=1000)
    files[1].write_text('{"text": "new text"}\n')
    written = stop_after(monkeypatch, 10**6, Stopped())
    build(files, TOKENIZER, tmp_path / "out", part_bytes=1000)
    assert len(written) == 2
    write_documents(
        ["old", "new text", "old"], load_tokenizer(TOKENIZER), tmp_path / "x", append_eod=False
    )
    assert (tmp_path / "x.bin").read_bytes() == (tmp_path / "out_text_document.bin").read_bytes()


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_kill_between_the_last_renames_is_made_good(renames, source, tmp_path, monkeypatch):
    keys, done, rename = ("text", "n"), [], Path.rename

    def killed(self, target):
        if self.name.startswith("joined_") and ".partial" not in self.name:
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        build([source], TOKENIZER, tmp_path / "out", json_keys=keys)
    monkeypatch.undo()
    counts = build([source], TOKENIZER, tmp_path / "out", json_keys=keys)
    assert counts.documents == 40
    assert all(len(IndexedDataset(tmp_path / f"out_{k}_document").documents) == 41 for k in keys)
    assert not (tmp_path / "out.building").exists()


def test_two_builds_of_one_output_are_refused(source, tmp_path):
    with (
        unfinished.locked(tmp_path / "out.building"),
        pytest.raises(DataError, match=r"out\.building is in use by another build"),
    ):
        build([source], TOKENIZER, tmp_path / "out")
    assert build([source], TOKENIZER, tmp_path / "out").documents == 40


# Kills and full disks, in processes of their own


def start(words: list[str], **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlm_jax", "data", "build", "--tokenizer", str(TOKENIZER)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *words], **(pipes | options))


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def wait_until(what, seconds: float = 30):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def long_source(tmp_path_factory) -> tuple[Path, Counts, bytes]:
    """Enough text for some seconds, and what becomes of it."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "in.jsonl").write_bytes(PROSE.read_bytes() * 16)
    counts = build([folder / "in.jsonl"], TOKENIZER, folder / "out")
    return folder / "in.jsonl", counts, (folder / "out_text_document.bin").read_bytes()


SLOW = pytest.mark.slow
STOPS = [
    pytest.param(how, n, marks=() if (how, n) in (("SIGKILL", "2"), ("SIGTERM", "1")) else SLOW)
    for how in ("SIGKILL", "SIGTERM", "SIGINT")
    for n in ("1", "2")
]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("how", "n_workers"), STOPS)
def test_a_stopped_build_goes_on_and_leaves_no_process(how, n_workers, long_source, tmp_path):
    file, counts, tokens = long_source
    words = ["--input", str(file), "--output", str(tmp_path / "out"), "--workers", n_workers]
    process = start(words)
    folder = tmp_path / "out.building"
    finished = lambda: len(list(folder.glob("????????????????????????.json")))  # noqa: E731
    wait_until(lambda: finished() >= 2)
    children = children_of(process.pid)
    assert bool(children) == (n_workers == "2")
    process.send_signal(getattr(signal, how))
    out, err = process.communicate(timeout=30)
    assert process.returncode == (-9 if how == "SIGKILL" else 75)
    if how != "SIGKILL":
        assert out.startswith("stopped on request. ")
        assert "Traceback" not in err
    wait_until(lambda: not any(map(alive, children)), seconds=10)
    assert not list(tmp_path.glob("out_*"))
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*_0.bin")}
    assert len(done) >= 2
    process = start([*words, "--max_document_bytes", "2000000000"])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.startswith(f"{counts.documents:,} documents, {counts.tokens:,} tokens, ")
    assert "MB of input finished" in err
    assert (tmp_path / "out_text_document.bin").read_bytes() == tokens
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.multiprocess
@pytest.mark.parametrize("n_workers", [pytest.param("1", marks=SLOW), "2"])
def test_a_full_disk_is_one_message_and_with_room_it_goes_on(n_workers, long_source, tmp_path):
    """The limit on a file's size meets a part, or only the joined file."""
    file, counts, tokens = long_source
    words = ["--input", str(file), "--output", str(tmp_path / "out"), "--workers", n_workers]
    for limit, kept in ((100_000, 0), (len(tokens) // 2, 8)):
        process = start(words)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        told = [line for line in err.splitlines() if line.startswith("mlm-jax: ")]
        assert len(told) == 1, err
        assert "cannot be written: File too large; what is finished is kept" in told[0]
        assert "Traceback" not in err
        assert not list(tmp_path.glob("out_*"))
        assert len(list((tmp_path / "out.building").glob("*_0.bin"))) >= kept
    process = start(words)
    out, _ = process.communicate(timeout=60)
    assert out.startswith(f"{counts.documents:,} documents, ")
    assert (tmp_path / "out_text_document.bin").read_bytes() == tokens


def test_a_full_file_system_leaves_nothing_under_the_final_name(long_source, tmp_path):
    """Of 2 MB, where root may mount one."""
    file, _, tokens = long_source
    assert len(tokens) > 2 << 20
    command = [sys.executable, "-m", "mlm_jax", "data", "build", "--tokenizer", str(TOKENIZER)]
    words = " ".join([*command, "--input", str(file), "--output", f"{tmp_path}/out"])
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", f"""
            mount -t tmpfs -o size=2m none {tmp_path} || exit 99
            {words}; status=$?; ls {tmp_path}; exit $status"""],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"mounting is not permitted: {done.stderr}")
    assert done.returncode == 1
    assert "cannot be written: No space left on device" in done.stderr
    assert done.stderr.count("mlm-jax: ") == 1
    assert done.stdout == "out.building\n"


@pytest.mark.multiprocess
@pytest.mark.parametrize("n_workers", ["1", "2"])
def test_standard_input_is_read_and_gone_on_with(n_workers, tmp_path):
    content = PROSE.read_bytes() * 3
    script = (
        "import sys\nfrom mlm_jax.__main__ import main\n"
        "from mlm_jax.data.preprocess import inputs\ninputs.OF_STREAM = inputs.LEAST = 100_000\n"
        "if __name__ == '__main__': sys.exit(main())"
    )
    (tmp_path / "program.py").write_text(script)
    words = ["data", "build", "--tokenizer", str(TOKENIZER), "--input", "-", "--append_eod"]
    words += ["--output", str(tmp_path / "out"), "--workers", n_workers]

    def run(given: bytes) -> subprocess.CompletedProcess:
        command = [sys.executable, str(tmp_path / "program.py"), *words]
        return subprocess.run(command, input=given, capture_output=True, check=False)

    first = run(content + b"bad\n")
    assert first.returncode == 2
    assert b"-, line 184: not JSON" in first.stderr
    finished = list((tmp_path / "out.building").glob("????????????????????????.json"))
    assert len(finished) > 5
    second = run(content)
    assert second.returncode == 0, second.stderr
    assert b"MB of input finished" in second.stderr
    golden = (GOLDEN / "prose_a_text_document.bin").read_bytes()
    assert (tmp_path / "out_text_document.bin").read_bytes() == golden * 3


# Pieces


def test_chunks():
    texts = ["aaaa", "", "bbb", "cc", "d"]
    assert list(chunks(texts, 6)) == [["aaaa", ""], ["bbb", "cc"], ["d"]]
    assert list(chunks([], 6)) == []


def test_progress_tells_speed_share_and_what_is_left(monkeypatch, caplog):
    clock = iter([0.0, 5.0, 20.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    caplog.set_level("INFO", logger="mlm_jax")
    bar = progress.Progress(total=100_000_000)
    bar.skip(20_000_000)
    bar.add(documents=4000, text_bytes=30_000_000, read=40_000_000)
    bar.show()  # too early
    bar.show()
    (line,) = caplog.messages
    assert line.split("  ") == [
        " 60%", "4k documents", "200 docs/s", "1.5 MB/s", "ETA 0:00:20",
    ]  # fmt: skip
