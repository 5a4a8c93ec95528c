"""From settings to batches: batch k is a function of seed, batch sizes and data alone."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np

from mlm_jax.batch_sizes import BatchSizes
from mlm_jax.config import RunConfig
from mlm_jax.data.blend_order import normalised, samples_per_dataset
from mlm_jax.data.builtin import Corpus
from mlm_jax.data.mix import Mix, Part, index_cache, naming, open_files
from mlm_jax.data.objectives.windows import Row
from mlm_jax.data.stream import Epochs, Exhaustive, Stream, Weighted
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import DataError

HostBatch = dict[str, np.ndarray]
REQUESTS = 32  # to remote files at once


class Data(NamedTuple):
    """What a run reads. valid is None where the split has no part for it."""

    train: "Batches"
    valid: "Batches | None"
    tokenizer: Tokenizer | None
    corpus: Corpus | None  # a built-in one, where data.path is not set
    fingerprint: dict[str, Any]  # what a run that goes on must find again, wherever it is then


class Batches:
    """Batch k of a split: samples sizes.start(k) to sizes.start(k + 1) of its stream."""

    def __init__(self, run: RunConfig, split: str, stream: Stream, sizes: BatchSizes):
        self.run, self.split, self.stream, self.sizes = run, split, stream, sizes
        self.map: Callable[..., Iterable[Row]] = map
        if "://" in f"{run.data.path} {run.data.valid_path}":  # each row waits for its request
            self.map = ThreadPoolExecutor(REQUESTS, thread_name_prefix="data").map

    def __reduce__(self):  # another process opens the files itself
        return reopened, (self.run, self.split)

    @property
    def n_samples(self) -> int:
        """Of an epoch; of what has none, as many as were asked for."""
        return self.stream.n_samples

    def batch(self, k: int, rows: np.ndarray | None = None, *, once: bool = False) -> HostBatch:
        """tokens, targets, segments, positions int32 [B, T]; weights float32 [B, T], 0 = untrained.

        segments and positions, which keep packed documents apart, are left out where settings say
        so. rows: of the batch, ascending, where not all are wanted. once: a sample that is seen
        again has weight 0.
        """
        start = self.sizes.start(k)
        numbers = start + (np.arange(self.sizes.size(k)) if rows is None else rows)
        samples = list(self.map(self.stream.row, numbers.tolist()))
        batch = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        if once:
            new = np.array([self.stream.is_new(i) for i in numbers.tolist()])
            batch["weights"] *= new[:, None]
        return batch

    def prefetch(
        self, start: int, stop: int, rows: Mapping[int, np.ndarray] | None = None
    ) -> Generator[HostBatch, None, None]:
        """Batches start to stop, read ahead by a thread, or by data.workers processes.

        rows: by the size of a batch, those of it that are wanted. Closing the iterator ends the
        thread or the processes.
        """
        import grain
        from absl import flags

        def read(k: int) -> HostBatch:
            return self.batch(k, rows[self.sizes.size(k)] if rows else None)

        workers = self.run.data.workers
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1 if workers else 4)
        batches = grain.MapDataset.range(start, stop).map(read).to_iter_dataset(ahead)
        if workers:
            if not flags.FLAGS.is_parsed():  # which grain's processes are started with
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            # Memory shared with grain's processes is not all freed (0.2.18): batches are small.
            through_pipes = grain.experimental.DatasetOptions(min_shm_size=2**40)
            batches = grain.experimental.WithOptionsIterDataset(batches, through_pipes)
            batches = batches.mp_prefetch(options, worker_init_fn=end_with_parent)
        with closing(iter(batches)) as batches:
            yield from batches


def end_with_parent(*_: int) -> None:
    """In a worker process: not at Ctrl-C, which a terminal sends it too, but however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end_with_parent", daemon=True).start()


def open_data(run: RunConfig) -> Data:
    """Opens and checks the files of a run. Raises DataError naming what does not fit."""
    files = open_files(run)
    if files.tokenizer and files.tokenizer.vocab_size > run.model.vocab_size:
        size = files.tokenizer.vocab_size
        raise DataError(
            f"model.vocab_size={run.model.vocab_size} is smaller than the tokenizer's {size}; try"
            f" model.vocab_size={size}"
        )
    mixes = {"train": files.train, "valid": files.valid}
    for source in dict.fromkeys(p.source for mix in mixes.values() if mix for p in mix.parts):
        source.check()
    batches = {split: open_batches(run, split, mix) for split, mix in mixes.items() if mix}
    fingerprint = files.train.fingerprint()
    if run.data.epochs == "together":
        fingerprint |= {"samples": samples_asked(run, "train")}  # which their order depends on
    train, valid = batches["train"], batches.get("valid")
    return Data(train, valid, files.tokenizer, files.corpus, fingerprint)


def reopened(run: RunConfig, split: str) -> Batches:
    """The batches of a split, of a run whose files were checked."""
    return open_batches(run, split, getattr(open_files(run), split))


def open_batches(run: RunConfig, split: str, mix: Mix) -> Batches:
    sizes, n = BatchSizes.of(run), samples_asked(run, split)
    if split == "valid":
        sizes = BatchSizes([(0, run.train.global_batch_size)])
    setting = f"data.{'valid_path' if run.data.valid_path and split == 'valid' else 'path'}"
    with naming(f"{setting}={getattr(run.data, setting[5:])!r}, {split}"):
        return Batches(run, split, open_stream(run, split, mix, n), sizes)


def open_stream(run: RunConfig, split: str, mix: Mix, n: int) -> Stream:
    """The samples of a mix in the order of training; n of them are asked for."""
    seed, cache, only = run.train.seed, index_cache(run), len(mix.parts) == 1
    weights = mix.weights

    def apart(part: Part) -> Epochs:
        return Epochs(lambda e: part.source.epoch(part.documents, epoch_seed(seed, e)))

    def together(part: Part, asked: int | None) -> Epochs:
        return Epochs(lambda _: part.source.epoch(part.documents, seed, asked))

    if run.data.epochs == "apart":
        streams = [apart(part) for part in mix.parts]
        if only:
            return streams[0]
        if weights is None:
            return Exhaustive(streams, cache)
        return Weighted(streams, normalised(weights), n, cache)
    asked: list[Any] = [n if only else None] * len(mix.parts)  # None: an epoch
    if weights is not None:
        asked = samples_per_dataset(normalised(weights), n)
    streams = [together(*part) for part in zip(mix.parts, asked, strict=True)]
    if only:
        return streams[0]
    there = [stream.n_samples for stream in streams]
    if weights is None and split == "valid":
        n = min(n, sum(there))
    stream = Weighted(streams, normalised(weights or there), n, cache)
    if stream.repeats():
        raise DataError(
            f"{n} samples are asked for, and the files have {there}; give the blend weights, train"
            f" fewer steps than train.steps={run.train.steps}, or set data.epochs='apart'"
        )
    return stream


def samples_asked(run: RunConfig, split: str) -> int:
    """As many as Megatron-LM asks of a split (get_train_valid_test_num_samples)."""
    t = run.train
    if split == "train":
        return BatchSizes.of(run).start(t.steps)
    return (t.steps // t.eval_every + 1) * t.eval_batches * t.global_batch_size


def epoch_seed(seed: int, epoch: int) -> int:
    """That of the run for its first epoch, as in Megatron-LM; later ones have their own."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]) if epoch else seed
