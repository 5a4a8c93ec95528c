"""How good a model is by now, while it is trained: held-out loss, a sample of text, completions."""

import functools
import logging
import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlm_jax.config import RunConfig
from mlm_jax.data.pipeline import Data
from mlm_jax.data.placement import Feed
from mlm_jax.distributed import at, lead_says
from mlm_jax.evaluate.completions import PROMPTS, complete
from mlm_jax.inference.engine import generate
from mlm_jax.layout import Layout, bytes_held
from mlm_jax.metrics import MetricsLog, NoMetricsLog
from mlm_jax.step import Steps
from mlm_jax.stop import AgreedStop, StopSignals

log = logging.getLogger(__name__)


class Examination:
    """Writes rows of metrics about the weights of a step."""

    def __init__(
        self, run: RunConfig, layout: Layout, data: Data, steps: Steps,
        rows: MetricsLog | NoMetricsLog, stop: StopSignals | AgreedStop,
    ):  # fmt: skip
        self.run, self.layout, self.data, self.steps = run, layout, data, steps
        self.rows, self.stop = rows, stop
        self.feed = Feed(data.valid, layout) if data.valid else None

    def hold(self, params: nnx.State, step: int, last: bool) -> bool:
        """All parts that metrics.jsonl does not have yet, the last two at the last step only.

        A signal ends it, between two batches of the evaluation too. Returns whether all is there.
        """
        parts = {"eval": self.evaluate, "sample": self.sample}
        if last:
            parts |= {"baselines": self.compare, "completions": self.complete}
        if not self.can_generate:
            parts = {name: parts[name] for name in parts if name in ("eval", "baselines")}
        done = lead_says(lambda: sorted(self.rows.names(step)))
        for name, write in parts.items():
            at("compile", step)  # programs of its own, the first time
            if self.stop:
                return False
            if name not in done:
                write(params, step)
        return True

    def evaluate(self, params: nnx.State, step: int) -> None:
        """A row of held-out loss."""
        if not self.feed:
            return
        n_samples, B = self.feed.batches.n_samples, self.run.train.global_batch_size
        nats = weight = n_bytes = 0.0
        for k in range(min(self.run.train.eval_batches, -(-n_samples // B))):
            if self.stop:
                return
            at("evaluate" if k else "compile", step)
            batch = self.feed.batch(k, once=True)
            sums = self.steps.evaluate(params, batch)
            nats, weight = nats + float(sums[0]), weight + float(sums[1])
            if self.token_bytes is not None:
                n_bytes += float(bytes_of(self.token_bytes, batch["targets"], batch["weights"]))
        bits = nats / math.log(2) / n_bytes if n_bytes else None
        self.rows.write("eval", step, eval_loss=nats / max(weight, 1), bits_per_byte=bits)

    def sample(self, params: nnx.State, step: int) -> None:
        """A few words after a prompt, where there is a tokenizer."""
        prompt, tokenizer = self.sample_prompt(), self.data.tokenizer
        if prompt and tokenizer:
            m = self.run.model
            room = m.target_len if m.seq2seq else m.seq_len - len(tokenizer.encode(prompt))
            room = min(48, room)
            if room >= 8:
                eos = tokenizer.special.get("eos")  # of a chat: what ends a turn
                stop = [] if eos is None else [tokenizer.decode([eos])]
                model = self.model(params)
                text = generate(model, [prompt], max_tokens=room, seed=step, stop=stop)[0]
                self.rows.write("event", step, event="sample", prompt=prompt, text=text)

    def compare(self, params: nnx.State, step: int) -> None:
        """What is reached without a network, of a built-in corpus."""
        if self.data.corpus and self.data.corpus.baselines:
            self.rows.write("event", step, event="baselines", **self.data.corpus.baselines)

    def complete(self, params: nnx.State, step: int) -> None:
        """With Python's sources: what completions are worth."""
        if self.writes_python and self.run.model.seq_len >= 128:
            rows = complete(self.model(params), seed=self.run.train.seed)
            self.rows.write("event", step, event="completions", completions=rows)

    @functools.cached_property
    def can_generate(self) -> bool:
        """Whether the model writes, and its weights, laid out for that, take no more room than
        training does.

        They do take more where a pipeline's stages do not divide the layers' dims, so that none is
        split.
        """
        if not self.run.model.causal:
            return False
        layout = self.layout.generating(self.run.model)
        able = bytes_held(layout.placed(self.steps.abstract.params)) <= bytes_held(
            self.steps.abstract
        )
        if not able:
            log.warning(
                "no samples: weights of whole layers would not fit beside the training state"
            )
        return able

    def model(self, params: nnx.State) -> Any:
        model = nnx.merge(self.steps.graphdef, params)
        model.tokenizer = self.data.tokenizer
        return model

    @property
    def writes_python(self) -> bool:
        python = self.data.corpus is not None and self.data.corpus.kind == "python"
        return python and not self.run.model.seq2seq

    def sample_prompt(self) -> str | None:
        """The first 16 held-out tokens; of an example, those before what is to be learned."""
        if self.writes_python:
            return PROMPTS[0]
        if self.data.tokenizer is None:
            return None
        row = (self.data.valid or self.data.train).stream.row(0)
        end = 16
        if self.run.model.seq2seq:  # all that it reads but the end, which generate adds
            end = min(int(row["segments"].sum()) - 1, 64)
            return self.data.tokenizer.decode(row["tokens"][:end].tolist())
        if self.run.data.objective in ("chat", "pairs"):
            end = 1 + int(row["weights"].argmax())
        return self.data.tokenizer.decode(row["tokens"][:end].tolist())

    @functools.cached_property
    def token_bytes(self) -> np.ndarray | None:
        """Bytes each id stands for, [vocab_size]; ids that the tokenizer does not know count 0.

        None without a tokenizer, and where words are told by what stands behind them too: bits of
        these are no length of a text.
        """
        if self.data.tokenizer is None or not self.run.model.causal:
            return None
        known = self.data.tokenizer.token_bytes()
        return np.pad(known, (0, self.run.model.vocab_size - len(known)))


@jax.jit
def bytes_of(token_bytes: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """What these targets are as text, over all processes: float32 []."""
    return (token_bytes[targets] * weights).sum()
