"""Building token files against the bare tokenizer and Hugging Face datasets: same text, one run.

python benchmarks/data.py [--rounds 5] [--megabytes 20] [--workers 1 2]
pip install datasets     the peer; without it only ours and the bare tokenizer are measured

The text is the standard library's sources, repeated, as JSON lines; the tokenizer is that of the
golden files. Each contestant is a process of its own, and all take turns. "bare" encodes texts that
are in memory already, with as many threads as ours has processes, and writes nothing; ours and
datasets read the file and write token ids. Processes are started anew in each turn; that takes ours
the time printed as "start", which a larger input would not notice.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from contest import hold, print_ratios, serve

TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "data" / "tokenizer"


class Ours:
    """mlm_jax.data.preprocess.build.build."""

    def __init__(self, source: Path, workers: int):
        from mlm_jax.data.preprocess.build import build

        self.build, self.source, self.workers = build, source, workers
        self.facts = {"version": "mlm_jax"}

    def run(self, turns: int) -> float:
        for _ in range(turns):
            with tempfile.TemporaryDirectory(dir=self.source.parent) as folder:
                counts = self.build(
                    [self.source], TOKENIZER, Path(folder) / "out", append_eod=True,
                    workers=self.workers,
                )  # fmt: skip
        return counts.tokens

    def memory_gib(self) -> None:
        return None


class Bare:
    """tokenizers.Tokenizer.encode_batch_fast, on texts in memory."""

    def __init__(self, source: Path, threads: int):
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
        self.texts = [json.loads(line)["text"] for line in source.open()]
        self.facts = {"version": f"tokenizers {tokenizers.__version__}"}

    def run(self, turns: int) -> float:
        for _ in range(turns):
            tokens = 0
            for begin in range(0, len(self.texts), 100):
                batch = self.texts[begin : begin + 100]
                encodings = self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
                tokens += sum(len(encoding.ids) for encoding in encodings)
        return tokens

    def memory_gib(self) -> None:
        return None


class Datasets:
    """datasets.map, which writes Arrow files of lists of ids."""

    def __init__(self, source: Path, workers: int):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os.environ["HF_HOME"] = str(source.parent / "hf")
        os.environ["HF_HUB_OFFLINE"] = "1"
        import datasets
        import tokenizers

        datasets.disable_progress_bars()
        self.tokenizer = tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
        self.datasets, self.source, self.workers = datasets, source, workers
        self.facts = {"version": f"datasets {datasets.__version__}"}

    def run(self, turns: int) -> float:
        for _ in range(turns):
            with tempfile.TemporaryDirectory(dir=self.source.parent) as cache:
                loaded = self.datasets.load_dataset(
                    "json", data_files=str(self.source), split="train", cache_dir=cache
                )
                processes = self.workers if self.workers > 1 else None
                done = loaded.map(
                    self.encode, batched=True, num_proc=processes, remove_columns=["text"]
                )
                tokens = sum(done["length"])
        return tokens

    def encode(self, batch: dict) -> dict:
        encodings = self.tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        ids = [encoding.ids + [0] for encoding in encodings]
        return {"ids": ids, "length": [len(i) for i in ids]}

    def memory_gib(self) -> None:
        return None


CONTESTANTS = {"mlm_jax": Ours, "bare tokenizer": Bare, "datasets.map": Datasets}


def write_corpus(file: Path, megabytes: int) -> tuple[int, int]:
    """Documents and bytes of the text in them."""
    from mlm_jax.data.corpora.python import RECIPE

    texts = [example.content for example in RECIPE.harvest(RECIPE.packages())]
    documents = n_bytes = 0
    with file.open("w") as out:
        while n_bytes < megabytes * 10**6:
            text = texts[documents % len(texts)]
            out.write(json.dumps({"text": text}) + "\n")
            documents, n_bytes = documents + 1, n_bytes + len(text.encode())
    return documents, n_bytes


def compare(source: Path, documents: int, n_bytes: int, workers: int, rounds: int) -> None:
    print(f"\n{workers} worker{'s' * (workers > 1)}: documents/s, MB/s, seconds", flush=True)
    arguments = ["--source", str(source), "--workers", str(workers)]
    field = hold(list(CONTESTANTS), arguments, rounds, 1, together=True)
    for one in field:
        wall = one.median("wall_s")
        row = f"  {one.name:16}{documents / wall:8,.0f} {n_bytes / wall / 1e6:7.2f} {wall:7.2f}"
        print(f"{row}   {one.rows[-1]['result']:,} tokens, {one.facts['version']}", flush=True)
    print_ratios(field, [one for one in field if one.name != "mlm_jax"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        try:
            entry = CONTESTANTS[args.contestant](args.source, args.workers[0])
        except ImportError as missing:
            raise SystemExit(f"{args.contestant}: {missing}") from None
        entry.run(1)
        return serve(entry)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "corpus.jsonl"
        documents, n_bytes = write_corpus(source, args.megabytes)
        print(f"{documents:,} documents, {n_bytes / 1e6:.1f} MB; {os.cpu_count()} cores")
        for workers in args.workers:
            compare(source, documents, n_bytes, workers, args.rounds)
    try:
        import reading  # windows/s of random reading, seconds to index
    except ImportError:
        return
    reading.windows()
    reading.indexing()


if __name__ == "__main__":
    main()
