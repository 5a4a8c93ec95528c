import builtins
import contextlib
import pickle
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mlm_jax.data import files, indexed
from mlm_jax.data.indexed import DTYPES, HEADER, IndexedDataset
from mlm_jax.data.indexed_writer import IndexedWriter, token_dtype
from mlm_jax.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "prose_a_text_document"
IDX, BIN = (Path(f"{GOLDEN}.{kind}").read_bytes() for kind in ("idx", "bin"))


def test_reads_what_megatron_wrote():
    indexed = IndexedDataset(GOLDEN)
    assert (indexed.dtype, len(indexed), indexed.n_tokens) == (np.uint16, 60, len(BIN) // 2)
    assert indexed.lengths.dtype == np.int32
    assert indexed.documents.tolist() == [*range(11), *range(10, 61)]  # document 10 is empty
    joined = np.concatenate([indexed.tokens(i) for i in range(len(indexed))])
    np.testing.assert_array_equal(joined, np.frombuffer(BIN, "<u2"))
    assert all(indexed.tokens(i)[-1] == 0 for i in range(len(indexed)))  # each ends with its EOD


def test_writes_what_megatron_wrote(tmp_path):
    golden, prefix = IndexedDataset(GOLDEN), tmp_path / "sub" / "copy"
    with IndexedWriter(prefix, golden.dtype) as writer:
        for begin, end in zip(golden.documents, golden.documents[1:], strict=False):
            writer.add_document([golden.tokens(i) for i in range(begin, end)])
        assert not Path(f"{prefix}.bin").exists()  # nothing is there before it is whole
    assert Path(f"{prefix}.idx").read_bytes() == IDX
    assert Path(f"{prefix}.bin").read_bytes() == BIN
    assert len(list(prefix.parent.iterdir())) == 2


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_comes_back(dtype, tmp_path):
    documents = [[[1, 2, 3], [4]], [], [[]], [[5, 6]]]
    indexed = write(tmp_path / "d", documents, dtype)
    assert indexed.dtype == dtype
    assert [indexed.tokens(i).tolist() for i in range(4)] == [[1, 2, 3], [4], [], [5, 6]]
    assert indexed.documents.tolist() == [0, 2, 2, 3, 4]
    assert indexed.offsets.tolist() == [n * dtype.itemsize for n in (0, 3, 4, 4)]


def test_a_stretch_ends_with_its_sequence(tmp_path):
    indexed = write(tmp_path / "d", [[[1, 2, 3], [4, 5]]])
    assert indexed.tokens(0, 1).tolist() == [2, 3]
    assert indexed.tokens(0, 1, 1).tolist() == [2]
    assert indexed.tokens(0, 2, 9).tolist() == [3]  # not the 4 behind it
    assert not indexed.tokens(1).flags.writeable
    with pytest.raises(IndexError):
        indexed.tokens(2)


def test_no_tokens_can_be_read(tmp_path):
    assert write(tmp_path / "a", []).n_tokens == 0
    indexed = write(tmp_path / "b", [[], [[]]])
    assert (len(indexed), indexed.n_tokens, indexed.tokens(0).size) == (1, 0, 0)


def test_a_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    texts = {
        "a": [[[1, 2, 3], [4]], [[5]]], "same": [[[1, 2, 3], [4]], [[5]]],
        "token": [[[1, 2, 9], [4]], [[5]]], "lengths": [[[1, 2], [3, 4]], [[5]]],
        "documents": [[[1, 2, 3]], [[4], [5]]], "empty": [],
    }  # fmt: skip
    prints = {n: write(tmp_path / n, t).fingerprint() for n, t in texts.items()}
    assert prints["a"] == prints["same"]
    assert prints["a"] == {
        "documents": 2, "sequences": 3, "tokens": 5, "dtype": "uint16",
        "crc32": prints["a"]["crc32"],
    }  # fmt: skip
    others = [prints[n]["crc32"] for n in ("token", "lengths", "documents", "empty")]
    assert len({prints["a"]["crc32"], *others}) == 5


def test_pickle_sends_the_path_not_the_tokens():
    sent = pickle.dumps(IndexedDataset(GOLDEN))
    assert len(sent) < 1000
    assert (
        pickle.loads(sent).tokens(3)[:4].tolist() == IndexedDataset(GOLDEN).tokens(3, 0, 4).tolist()
    )


@pytest.mark.parametrize(("vocab_size", "name"), [(65499, "uint16"), (65500, "int32")])
def test_token_dtype(vocab_size, name):
    assert token_dtype(vocab_size).name == name


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write(tmp_path / "d", [[[1, 2, 3]]])
    with pytest.raises(DataError):
        write(tmp_path / "d", [[[7]], [[-7]]])
    assert IndexedDataset(tmp_path / "d").tokens(0).tolist() == [1, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_an_old_index_never_meets_new_tokens(tmp_path, monkeypatch):
    write(tmp_path / "d", [[[1, 2, 3]]])
    rename = Path.rename

    def stop_before_the_index(source, target):
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", stop_before_the_index)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "d", [[[1], [2, 3]]])
    with pytest.raises(DataError, match=r"d\.idx: no such file"):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize("token", [-1, 65536, 1.5])
def test_a_token_that_does_not_fit_is_refused(token, tmp_path):
    with pytest.raises(DataError, match=f"d: token {token} does not fit uint16"):
        write(tmp_path / "d", [[[1, token]]])
    assert not list(tmp_path.iterdir())


def test_a_dtype_without_a_code_is_refused(tmp_path):
    with pytest.raises(DataError, match="no code for uint32"):
        IndexedWriter(tmp_path / "d", np.uint32)


@pytest.mark.parametrize("kind", ["idx", "bin"])
def test_a_missing_file_is_named(kind, tmp_path):
    write(tmp_path / "d", [[[1]]])
    Path(tmp_path / f"d.{kind}").unlink()
    with pytest.raises(DataError, match=rf"d\.{kind}: no such file"):
        IndexedDataset(tmp_path / "d")
    Path(tmp_path / f"d.{kind}").mkdir()
    with pytest.raises(DataError, match=rf"d\.{kind}: cannot be read"):
        IndexedDataset(tmp_path / "d")


def test_every_truncation_is_noticed(pair):
    for length in [*range(0, HEADER.size + 9), *range(HEADER.size, len(IDX), 7), len(IDX) - 1]:
        with pytest.raises(DataError, match=r"golden\.idx: "):
            pair(idx=IDX[:length])
    with pytest.raises(DataError, match=r"golden\.idx: "):
        pair(idx=IDX + b"\0")
    for length in [*range(0, len(BIN), 4999), len(BIN) - 2, len(BIN) - 1, len(BIN) + 1]:
        with pytest.raises(DataError, match=r"golden\.bin: "):
            pair(idx=IDX, bin=(BIN + b"\0")[:length])


def test_every_flipped_bit_of_the_header_is_noticed(pair):
    for byte in range(HEADER.size):
        for flip in [1 << bit for bit in range(8)] + [0xFF]:
            with pytest.raises(DataError, match=r"golden\.idx: "):
                pair(idx=flipped(byte, flip))


def test_damage_behind_the_header_is_noticed_or_harmless(pair):
    """The boundary of a document may move unnoticed; a sequence may not."""
    golden, rng = IndexedDataset(GOLDEN), np.random.default_rng(0)
    first_of_documents = len(IDX) - golden.documents.nbytes
    for byte in range(HEADER.size, first_of_documents, 3):
        with pytest.raises(DataError, match=r"golden\.(idx|bin): "):
            pair(idx=flipped(byte, int(rng.integers(1, 256))))
    for byte in range(first_of_documents, len(IDX), 3):
        with contextlib.suppress(DataError):
            indexed = pair(idx=flipped(byte, int(rng.integers(1, 256))))
            np.testing.assert_array_equal(indexed.offsets, golden.offsets)
            assert np.all(indexed.documents[1:] >= indexed.documents[:-1])


@pytest.mark.parametrize("at_once", [1, 2, 2**18])
@pytest.mark.parametrize(
    ("lengths", "offsets", "documents", "problem"),
    [
        ([2, 1], [0, 4], [0, 2], None),
        ([3, -1], [0, 6], [0, 2], "negative length"),
        ([2, 1], [0, 2], [0, 2], "sequence 1 is said to begin at byte 2 instead of 4"),
        ([2, 1], [0, 400], [0, 2], "contradict"),
        ([2, 1], [2, 6], [0, 2], "contradict"),
        ([2, 1], [0, 4], [], "do not span"),
        ([2, 1], [0, 4], [1, 2], "do not span"),
        ([2, 1], [0, 4], [0, 1], "do not span"),
        ([2, 1], [0, 4], [0, 2, 1, 2], "ends before it begins"),
        ([2, 1], [0, 4], [0, -(2**63), 2**63 - 1, 2], "ends before it begins"),
    ],
)
def test_contradictions_are_noticed(
    lengths, offsets, documents, problem, at_once, pair, monkeypatch
):
    monkeypatch.setattr(indexed, "CHECKED_AT_ONCE", at_once)
    header = HEADER.pack(b"MMIDIDX\0\0", 1, 8, len(lengths), len(documents))
    layout = f"<{len(lengths)}i{len(offsets)}q{len(documents)}q"
    both = {"idx": header + struct.pack(layout, *lengths, *offsets, *documents), "bin": bytes(6)}
    if problem is None:
        assert pair(**both).n_tokens == 3
    else:
        with pytest.raises(DataError, match=problem):
            pair(**both)


def test_a_multimodal_dataset_is_refused(pair):
    modes = bytes(60)  # int8, one of each sequence
    with pytest.raises(DataError, match=r"golden\.idx: has modes of a multimodal dataset"):
        pair(idx=IDX + modes)
    with pytest.raises(DataError, match=r"golden\.idx: 1.* bytes, where 60 sequences"):
        pair(idx=IDX + modes + b"\0")


def test_documents_of_sentences(tmp_path):
    sentences = write(tmp_path / "d", [[[1, 2], [3]], [], [[4, 5, 6], [7], [8, 9]]])
    assert sentences.documents.tolist() == [0, 2, 2, 5]
    assert (len(sentences), sentences.lengths.tolist()) == (5, [2, 1, 3, 1, 2])
    assert sentences.tokens(4).tolist() == [8, 9]


def test_a_remote_pair_reads_as_the_local_one(remote):
    local, far = IndexedDataset(GOLDEN), IndexedDataset(remote("golden"))
    assert far.prefix == "memory://bucket/golden"
    assert far.fingerprint() == local.fingerprint()
    for name in ("lengths", "offsets", "documents"):
        np.testing.assert_array_equal(getattr(far, name), getattr(local, name))
    for i in range(len(local)):
        for window in [(), (0, 5), (7,), (3, 10**9), (10**9, 4)]:
            np.testing.assert_array_equal(far.tokens(i, *window), local.tokens(i, *window))
    assert not far.tokens(0).flags.writeable
    again = pickle.loads(pickle.dumps(far))
    np.testing.assert_array_equal(again.tokens(59), local.tokens(59))


def test_only_chunks_with_the_tokens_asked_for_are_requested(remote, monkeypatch):
    """Windows are smaller than a chunk, straddle two, and take several."""
    monkeypatch.setattr(files, "CHUNK", 64)
    local, far = IndexedDataset(GOLDEN), IndexedDataset(remote("golden"))
    asked, read = [], files.Remote._read
    monkeypatch.setattr(
        files.Remote, "_read", lambda s, *ends: asked.append(ends) or read(s, *ends)
    )
    first = int(local.offsets[30]) // 64
    for window in [(0, 3), (1, 10), (2, 100), (0, 3), (1, 100)]:
        np.testing.assert_array_equal(far.tokens(30, *window), local.tokens(30, *window))
    last = (int(local.offsets[30]) + 2 * 102 - 1) // 64
    assert asked == [(64 * chunk, 64 * chunk + 64) for chunk in range(first, last + 1)]
    np.testing.assert_array_equal(far.tokens(59), local.tokens(59))
    assert asked[-1][1] == len(BIN)  # the last chunk ends with the file


def test_threads_share_a_remote_pair(remote, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 1000)
    local, far = IndexedDataset(GOLDEN), IndexedDataset(remote("golden"))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(far.tokens, list(range(60)) * 3))
    for i, tokens in enumerate(found):
        np.testing.assert_array_equal(tokens, local.tokens(i % 60))


def test_a_remote_pair_that_is_damaged_is_named(remote):
    with pytest.raises(DataError, match=r"memory://bucket/no\.idx: no such file"):
        IndexedDataset("memory://bucket/no")
    with pytest.raises(DataError, match=r"memory://bucket/half\.idx: 40 bytes, where"):
        IndexedDataset(remote("half", idx=IDX[:40]))
    with pytest.raises(DataError, match=r"memory://bucket/short\.bin: 98 bytes, where"):
        IndexedDataset(remote("short", bin=BIN[:98]))
    far = IndexedDataset(remote("golden"))
    remote("golden", bin=BIN[:98])
    with pytest.raises(DataError, match=r"memory://bucket/golden\.bin: bytes .* it changed"):
        far.tokens(59)


def test_an_address_without_its_package_is_refused(monkeypatch):
    with pytest.raises(DataError, match=r"bogus://x/y\.idx: cannot be read: .*not known: bogus"):
        IndexedDataset("bogus://x/y")
    import_module = builtins.__import__

    def without_fsspec(name, *rest):
        if name.startswith("fsspec"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_module(name, *rest)

    for module in [name for name in sys.modules if name.startswith("fsspec")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without_fsspec)
    with pytest.raises(DataError, match=r"s3://x/y\.idx: No module .*fsspec, and with it s3fs"):
        IndexedDataset("s3://x/y")


@pytest.fixture
def remote():
    """Puts the golden pair in a bucket, with other bytes where some are given."""
    fsspec = pytest.importorskip("fsspec")

    def put(name, idx=IDX, bin=BIN):
        for kind, content in {"idx": idx, "bin": bin}.items():
            fsspec.filesystem("memory").pipe_file(f"/bucket/{name}.{kind}", content)
        return f"memory://bucket/{name}"

    yield put
    with contextlib.suppress(FileNotFoundError):  # a test may have put nothing
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.fixture
def pair(tmp_path):
    """Opens a copy of the golden pair after replacing the bytes of its files that are given."""

    def open_with(**files: bytes) -> IndexedDataset:
        for kind, content in files.items():
            (tmp_path / f"golden.{kind}").write_bytes(content)
        return IndexedDataset(tmp_path / "golden")

    open_with(idx=IDX, bin=BIN)
    return open_with


def flipped(byte, flip):
    return IDX[:byte] + bytes([IDX[byte] ^ flip]) + IDX[byte + 1 :]


def write(prefix, documents, dtype=np.uint16):
    with IndexedWriter(prefix, dtype) as writer:
        for sequences in documents:
            writer.add_document(sequences)
    return IndexedDataset(prefix)
