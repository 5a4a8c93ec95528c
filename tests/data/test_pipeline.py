"""What a run trains on, from its settings: which tokens, in which order, under which masks."""

import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlm_jax.config import RunConfig
from mlm_jax.data.indexed_writer import IndexedWriter
from mlm_jax.data.mix import Mix, Part, open_files
from mlm_jax.data.pipeline import open_data, open_stream, samples_asked
from mlm_jax.data.sampling import split_ranges
from mlm_jax.data.tokenizer import load_tokenizer
from mlm_jax.door import from_dict
from mlm_jax.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden"
DATA = GOLDEN / "data"
SPLITS = ("train", "valid", "test")


def a_run(data: dict, **sections: dict) -> RunConfig:
    model = {"seq_len": 64, "vocab_size": 8192}
    train = {"seed": 1234, "global_batch_size": 10, "steps": 300, "eval_every": 1000}
    train["eval_batches"] = 10
    given = {"model": model, "train": train}
    return from_dict({"data": data} | {k: v | sections.get(k, {}) for k, v in given.items()})


@pytest.fixture
def written(tmp_path):
    """written("name", documents): a prefix of them; token t of document d is 100 d + t."""

    def write(name: str, lengths: list[int], first: int = 0) -> str:
        with IndexedWriter(tmp_path / name, np.int32) as writer:
            for d, length in enumerate(lengths, first):
                writer.add_document([100 * d + np.arange(length)])
        return str(tmp_path / name)

    return write


@pytest.mark.smoke
@pytest.mark.parametrize("split", SPLITS)
def test_a_blend_is_megatrons(split):
    """Indices of the blend and of its parts, and the first tokens."""
    folder, number = GOLDEN / "gpt_dataset" / "blend", SPLITS.index(split)
    meta = json.loads((folder / "meta.json").read_text())
    golden = lambda name: np.load(folder / f"{split}_{name}.npy")  # noqa: E731
    pairs = zip(meta["weights"], meta["prefixes"], strict=True)
    path = " ".join(f"{weight} {DATA / prefix}" for weight, prefix in pairs)
    run = a_run({"path": path, "split": meta["split"], "epochs": "together"})
    asked = [samples_asked(run, "train"), samples_asked(run, "valid"), meta["requested"][2]]
    assert asked == meta["requested"]

    train, valid, *_ = open_files(run)
    mix = [train, valid][number] if number < 2 else Mix(
        tuple(Part(p.source, split_ranges(meta["split"], p.source.size)[2]) for p in train.parts),
        train.weights,
    )  # fmt: skip
    stream = open_stream(run, "train" if number == 2 else split, mix, asked[number])
    for ours, name in zip(stream.index, ("dataset_index", "dataset_sample_index"), strict=True):
        assert ours.dtype == golden(name).dtype
        np.testing.assert_array_equal(ours, golden(name))
    for part, epochs in enumerate(stream.streams):
        for name in ("document", "sample", "shuffle"):
            ours = getattr(epochs.epoch(0).samples.index, name)
            megatrons = golden(f"{part}_{name}_index")
            assert ours.dtype == megatrons.dtype
            np.testing.assert_array_equal(ours, megatrons)
    rows = [stream.row(i) for i in range(6)]
    np.testing.assert_array_equal([row["tokens"] for row in rows], golden("tokens"))
    np.testing.assert_array_equal([row["targets"] for row in rows], golden("labels"))


@pytest.mark.parametrize("case", ["one_epoch", "many_epochs"])
def test_batches_of_one_file_are_megatrons(case):
    folder = GOLDEN / "gpt_dataset" / case
    meta = json.loads((folder / "meta.json").read_text())
    train, valid, _ = meta["requested"]
    size = {"steps": train // 10, "eval_batches": valid // 10}
    data = {
        "path": str(DATA / "prose_a_text_document"), "split": meta["split"], "epochs": "together",
        "cross_document_attention": True,
    }  # fmt: skip
    opened = open_data(a_run(data, train=size))
    for name, split in (("train", opened.train), ("valid", opened.valid)):
        batch = split.batch(0)
        assert batch.keys() == {"tokens", "targets", "weights"}  # Megatron's default: no masks
        for ours, theirs in (("tokens", "tokens"), ("targets", "labels"), ("weights", "loss_mask")):
            np.testing.assert_array_equal(batch[ours][:6], np.load(folder / f"{name}_{theirs}.npy"))
        shuffle = np.load(folder / f"{name}_0_shuffle_index.npy")
        assert split.n_samples == len(shuffle)


def test_apart_each_epoch_holds_every_token_once(written):
    prefix = written("d", [7, 3, 12, 1, 9])
    data = {"path": prefix, "split": "1", "cross_document_attention": True}
    model = {"seq_len": 2, "vocab_size": 1000}
    train = open_data(a_run(data, model=model)).train
    n = train.n_samples
    assert n == (7 + 3 + 12 + 1 + 9 - 1) // 2  # the last token is only a target
    read = [[train.stream.row(e * n + i)["tokens"].tolist() for i in range(n)] for e in range(3)]
    for epoch in read:
        assert len({token for row in epoch for token in row}) == 2 * n
    assert read[0] != read[1] != read[2]
    again = open_data(a_run(data, model=model, train={"steps": 7})).train
    assert [again.stream.row(n + i)["tokens"].tolist() for i in range(n)] == read[1]


def test_a_weighted_blend_takes_its_shares_and_goes_on_for_ever(written):
    path = f"3 {written('a', [50] * 4)} 1 {written('b', [30, 40], first=50)}"
    data = {"path": path, "split": "1"}
    run = a_run(data, model={"seq_len": 8, "vocab_size": 6000}, train={"steps": 40})
    train = open_data(run).train
    from_b = [bool(train.stream.row(i)["tokens"][0] >= 5000) for i in range(400)]
    assert sum(from_b) == 100
    new = [train.stream.is_new(i) for i in range(400)]
    assert sum(new) == 24 + 8  # an epoch of each
    more = open_data(a_run(data, model={"seq_len": 8, "vocab_size": 6000}, train={"steps": 80}))
    for k in range(40):  # more steps have the same beginning
        np.testing.assert_array_equal(more.train.batch(k)["tokens"], train.batch(k)["tokens"])


def test_a_blend_without_weights_takes_all_of_all_once_an_epoch(written):
    path = f"{written('a', [41] * 4)} {written('b', [33], first=50)} {written('c', [17], first=60)}"
    run = a_run({"path": path, "split": "1"}, model={"seq_len": 8, "vocab_size": 8000})
    train = open_data(run).train
    assert train.n_samples == 20 + 4 + 2
    for epoch in range(2):
        rows = [train.stream.row(epoch * 26 + i) for i in range(26)]
        firsts = [row["tokens"][0] // 5000 for row in rows]
        assert np.bincount(firsts).tolist() == [20, 6]
        assert len({tuple(row["tokens"]) for row in rows}) == 26


def test_a_blend_asked_for_more_than_it_has_is_refused(written):
    path = f"{written('a', [41] * 4)} {written('b', [33], first=50)}"
    data = {"path": path, "split": "1", "epochs": "together"}
    model = {"seq_len": 8, "vocab_size": 6000}
    with pytest.raises(DataError, match=r"30 samples are asked for, and the files have \[20, 4\]"):
        open_data(a_run(data, model=model, train={"steps": 3}))
    assert open_data(a_run(data, model=model, train={"steps": 2})).train.n_samples == 20
    b = written("b", [33] * 2, first=50)
    data |= {"path": f"{written('a', [41] * 4)} {b}", "split": "1,1"}
    few = open_data(a_run(data, model=model, train={"steps": 1}))
    assert few.valid.n_samples < samples_asked(a_run(data), "valid")  # that is no reason to refuse


def test_files_behind_an_address_give_the_same_batches():
    fsspec = pytest.importorskip("fsspec")
    for kind in ("bin", "idx"):
        content = (DATA / f"prose_a_text_document.{kind}").read_bytes()
        fsspec.filesystem("memory").pipe(f"/corpus/a.{kind}", content)
    there, here = (
        open_data(a_run({"path": path})).train
        for path in ("memory://corpus/a", str(DATA / "prose_a_text_document"))
    )
    for k in range(3):
        for name, x in here.batch(k).items():
            np.testing.assert_array_equal(there.batch(k)[name], x)


def test_validation_may_have_files_of_its_own(written, tmp_path):
    a, b = written("a", [50] * 4), written("b", [50] * 2, first=50)
    (tmp_path / "splits.json").write_text(json.dumps({"train": [a], "valid": ["1", b]}))
    model = {"seq_len": 8, "vocab_size": 6000}
    for data in ({"path": a, "valid_path": b}, {"path": str(tmp_path / "splits.json")}):
        opened = open_data(a_run(data, model=model))
        assert {int(t) // 100 for t in opened.train.batch(0)["tokens"][:, 0]} <= set(range(4))
        assert {int(t) // 100 for t in opened.valid.batch(0)["tokens"][:, 0]} <= {50, 51}
    with pytest.raises(DataError, match="has a blend for each split"):
        open_data(a_run({"path": str(tmp_path / "splits.json"), "valid_path": b}, model=model))


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({}, {"segments", "positions"}),
        ({"reset_positions": False}, {"segments"}),
        ({"cross_document_attention": True}, set()),
        ({"cross_document_attention": True, "reset_positions": True}, {"positions"}),
    ],
)
@pytest.mark.parametrize("mask", [None, True, False])
def test_each_mask_of_packed_documents_is_a_setting(settings, keys, mask, written):
    data = {"path": written("d", [5] * 40), "split": "1", "eod_mask_loss": mask} | settings
    batch = open_data(a_run(data, model={"seq_len": 16})).train.batch(0)
    assert batch.keys() == {"tokens", "targets", "weights"} | keys
    crosses = batch["tokens"] // 100 != batch["targets"] // 100
    masked = not settings.get("cross_document_attention") if mask is None else mask
    np.testing.assert_array_equal(batch["weights"], 1 - crosses * masked)
    if "positions" in keys:
        np.testing.assert_array_equal(batch["positions"][:, 5:] <= 4, True)


def test_fill_in_the_middle_rearranges_and_keeps_the_characters(tmp_path):
    folder = tmp_path / "tokenizer"
    tokenizer = load_tokenizer(DATA / "tokenizer")
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(DATA / "tokenizer" / "tokenizer.json"))
    names = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]
    backend.add_special_tokens(names)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    data = {"path": str(DATA / "prose_a_text_document"), "tokenizer": str(folder)}
    model = {"seq_len": 256, "vocab_size": 8196}
    plain = open_data(a_run(data, model=model)).train.batch(0)
    with_fim = a_run(data | {"objective": "fim", "fim_rate": 1.0}, model=model)
    batch = open_data(with_fim).train.batch(0)
    np.testing.assert_array_equal(batch["tokens"], open_data(with_fim).train.batch(0)["tokens"])
    ids = [backend.token_to_id(name) for name in names]
    rearranged = np.isin(batch["tokens"], ids[:3]).any(axis=1)
    assert rearranged.all()
    for before, last, after in zip(
        plain["tokens"], plain["targets"][:, -1], batch["tokens"], strict=True
    ):
        letters = tokenizer.decode([t for t in after if t not in ids])
        assert set(letters) <= set(tokenizer.decode([*before, last])) | {"\ufffd"}
    lacking = {"tokenizer": str(DATA / "tokenizer"), "objective": "fim"}
    with pytest.raises(DataError, match="the tokenizer lacks tokens for fill-in-the-middle"):
        open_data(a_run(data | lacking, model=model))


def test_conversations_are_packed_and_trained_where_the_assistant_speaks(tmp_path):
    file = tmp_path / "chats.jsonl.gz"
    with gzip.open(file, "wt") as lines:
        for n in range(60):
            turns = [("user", f"Add {n} and {n}."), ("assistant", f"That is {2 * n}.")]
            messages = [{"role": role, "content": text} for role, text in turns]
            lines.write(json.dumps({"messages": messages}) + "\n")
    data = {
        "path": str(file), "objective": "chat", "tokenizer": str(DATA / "tokenizer"),
        "split": "50,10",
    }  # fmt: skip
    opened = open_data(a_run(data, model={"seq_len": 128}, train={"global_batch_size": 2}))
    tokenizer, train = opened.tokenizer, opened.train
    epochs = []
    for e in range(2):
        rows = [train.stream.row(e * train.n_samples + i) for i in range(train.n_samples)]
        said = [tokenizer.decode(row["targets"][row["weights"] > 0]) for row in rows]
        answers = sorted(a for a in "".join(said).split("<|im_end|>") if a)
        assert answers == sorted(f"That is {2 * n}." for n in range(50))
        epochs.append([row["tokens"].tolist() for row in rows])
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert {"segments", "positions"} <= train.batch(0).keys()
    assert opened.fingerprint["examples"] == 60
    again = open_data(a_run(data, model={"seq_len": 128}, train={"global_batch_size": 2}))
    assert again.fingerprint == opened.fingerprint  # read back from the cache, or built again


def test_pairs_are_trained_behind_their_prompt(tmp_path):
    (tmp_path / "pairs.tsv").write_text("".join(f"one {n}\tun {n}\n" for n in range(40)))
    data = {
        "path": str(tmp_path / "pairs.tsv"), "objective": "pairs", "split": "30,10",
        "tokenizer": str(DATA / "tokenizer"), "prompt": "English: {source}\nFrench: ",
    }  # fmt: skip
    opened = open_data(a_run(data, train={"global_batch_size": 2}))
    row = opened.train.stream.row(0)
    text = opened.tokenizer.decode(row["tokens"][row["segments"] == 0])
    number = text.split()[2]
    assert text == f"English: one {number}\nFrench: un {number}"
    said = opened.tokenizer.decode(row["targets"][(row["segments"] == 0) & (row["weights"] > 0)])
    assert said == f"un {number}<|endoftext|>"


@pytest.mark.parametrize(
    "objective",
    ["pairs", "causal", *(pytest.param(o, marks=pytest.mark.slow) for o in ("chat", "fim"))],
)
def test_every_objective_has_a_corpus(objective):
    if objective == "pairs":
        pytest.importorskip("django")
    builtin = "prose" if objective == "causal" else None
    run = a_run({"objective": objective, "builtin": builtin}, model={"vocab_size": 512})
    opened = open_data(run)
    assert opened.corpus.kind == {
        "chat": "conversations", "pairs": "en-fr", "fim": "python", "causal": "prose",
    }[objective]  # fmt: skip
    for split in (opened.train, opened.valid):
        batch = split.batch(0)
        assert batch["tokens"].shape == (10, 64)
        assert 0 < batch["weights"].sum() <= 640


@pytest.mark.multiprocess
def test_worker_processes_read_the_same_and_end_with_the_iterator():
    run = a_run({"path": str(DATA / "prose_a_text_document"), "workers": 2})
    train = open_data(run).train
    ahead = train.prefetch(3, 40)
    for k in range(3, 7):
        got = next(ahead)
        for name, x in train.batch(k).items():
            np.testing.assert_array_equal(got[name], x)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    ahead.close()
    gone(workers)


@pytest.mark.multiprocess
def test_worker_processes_end_with_a_killed_parent(tmp_path):
    script = f"""
from mlm_jax.data.pipeline import open_data
from mlm_jax.door import from_dict
import multiprocessing
if __name__ == "__main__":
    data = {{"path": {str(DATA / "prose_a_text_document")!r}, "workers": 2}}
    run = from_dict({{"data": data, "model": {{"seq_len": 64, "vocab_size": 8192}}}})
    ahead = open_data(run).train.prefetch(0, 1000)
    next(ahead)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    multiprocessing.Event().wait()
"""
    (tmp_path / "reads.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "reads.py")], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    assert len(workers) == 2
    limit = time.monotonic() + 30
    while any(map(is_alive, workers)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(workers: list) -> None:
    limit = time.monotonic() + 30
    while any(worker.is_alive() for worker in workers) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("-1 {a} 2 {b}", "weight -1.0 of .*; give a number above 0"),
        ("0 {a} 0 {b}", "weight 0.0 of"),
        ("nan {a} 1 {b}", "weight nan of"),
        ("0.5 {a} 0.5", "0.5 where a prefix is expected"),
        ("{a} {a}", "2 times; give it once"),
        ("{a} {b}x {a}y", "bx.idx: no such file[^$]*ay.idx: no such file"),
        ("{a}.bin", r"\.bin\.idx: no such file.*; try .*a"),
        ("{a}/my corpus", "a path with spaces is written 'in quotes'"),
        ("'{a}", "a path with spaces is written 'in quotes'"),
        ("nowhere.json", "nowhere.json: no such file"),
    ],
)
def test_a_path_that_cannot_be_is_refused(path, said, written):
    a, b = written("a", [50] * 4), written("b", [50] * 4)
    with pytest.raises(DataError, match=rf"data\.path=[^$]*{said}"):
        open_data(a_run({"path": path.format(a=a, b=b)}))
