"""Generation: a prefill of the prompts, then a compiled loop that adds a token a turn.

Prompts of different lengths share a batch, padded on the right: the token at position p of a row is
in slot p of its cache, so a row's new tokens overwrite its padding, which nothing ever looks at.
Lengths and batch sizes are rounded up, so that few programs are compiled.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from mlm_jax.config import ModelConfig
from mlm_jax.data.objectives.t5_spans import marks_of
from mlm_jax.errors import ConfigError
from mlm_jax.inference.beams import first_beams, search_on
from mlm_jax.inference.sampling import Sampling, choose
from mlm_jax.layers.cache import Cache
from mlm_jax.models import relaid

STOP_CHECK = 16  # tokens between looks for stop strings


def generate(
    model: Any, prompts: Sequence[str], *, max_tokens: int = 64, temperature: float | None = None,
    top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0, seed: int = 0,
    stop: Sequence[str] = (), beams: int = 1, length_penalty: float = 1.0,
) -> list[str]:  # fmt: skip
    """Continuations of the prompts, without the prompts; each ends before the first stop string.

    Of a model with an encoder, what its decoder writes when the encoder has read a prompt.
    temperature 0 is greedy; None is 0.8. The same seed, prompts and order give the same texts under
    any layout. beams: above 1, a search for the likeliest text (inference.beams) draws nothing.
    Raises ConfigError for a prompt that leaves no room for max_tokens in the context, and for a
    model that does not write.
    """
    check_writes(model)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(
            "this model has no tokenizer; train with data.tokenizer, or pass token ids"
        )
    if isinstance(prompts, str):
        raise ConfigError("prompts is one text; give a list of texts")
    stop = [s for s in ([stop] if isinstance(stop, str) else stop) if s]

    def ended(ids: list[int]) -> bool:
        text = tokenizer.decode(ids)
        return any(s in text for s in stop)

    for i, prompt in enumerate(prompts):
        try:
            prompt.encode()
        except UnicodeEncodeError as why:
            raise ConfigError(f"prompt {i} is not valid Unicode: {why}") from None
    if temperature is None:
        temperature = 0.8 if beams == 1 else 0.0
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    ids, eod_id, start = [tokenizer.prompt(prompt) for prompt in prompts], tokenizer.eod_id, 0
    if model.cfg.seq2seq:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        marks = marks_of(tokenizer)
        ids, eod_id, start = [[*row, marks.eos] for row in ids], marks.eos, marks.start
    new = generate_ids(
        model, [row or [eod_id or 0] for row in ids], max_tokens=max_tokens, sampling=sampling,
        seed=seed, eod_id=eod_id, ended=ended if stop else None, start=start, beams=beams,
        length_penalty=length_penalty,
    )  # fmt: skip
    return [_until(tokenizer.decode(row), stop) for row in new]


def generate_ids(
    model: Any, prompts: Sequence[Sequence[int]], *, max_tokens: int, sampling: Sampling,
    seed: int = 0, eod_id: int | None = None, ended: Any = None, start: int = 0, beams: int = 1,
    length_penalty: float = 1.0,
) -> list[list[int]]:  # fmt: skip
    """New token ids of each prompt, without eod_id, which ends a row; so does ended(ids).

    start: what a decoder beside an encoder reads first.
    """
    check_writes(model)
    cfg = model.cfg
    check(prompts, max_tokens, cfg, sampling, seed, beams, length_penalty)
    if not prompts:
        return []
    layout = model.layout.generating(cfg)
    model = relaid(model, layout)
    lengths = [len(p) for p in prompts]
    rows = round_up(len(prompts), layout.ways("batch"), cap=None)
    width = round_up(max(lengths), 16, cap=cfg.seq_len)
    written = (1, cfg.target_len + 1) if cfg.seq2seq else (max(lengths), cfg.seq_len)
    slots = round_up(written[0] + max_tokens, 64, cap=written[1])
    tokens_BP = np.zeros((rows, width), np.int32)
    for row, prompt in zip(tokens_BP, prompts, strict=False):
        row[: len(prompt)] = prompt
    lengths_B = np.array(lengths + [1] * (rows - len(prompts)), np.int32)
    seen_BV = np.zeros((rows, cfg.padded_vocab), bool)
    for row, prompt in zip(seen_BV, prompts, strict=False):
        row[[start] if cfg.seq2seq else list(prompt)] = True

    placed = jax.device_put((tokens_BP, seen_BV), layout.sharding("batch", None))
    lengths_B = jax.device_put(lengths_B, layout.sharding("batch"))
    turn = prefill(model, *placed, lengths_B, np.int32(start), slots)
    new: list[list[int]] = []
    greedy, eod = sampling.temperature == 0, -1 if eod_id is None else eod_id
    done, chunk = np.arange(rows) >= len(prompts), STOP_CHECK if ended else max_tokens
    if beams > 1:
        turn = turn._replace(done_B=jax.device_put(done, layout.sharding("batch")))
        search = first_beams(turn, beams)
        of = np.float32(length_penalty), np.int32(max_tokens), np.int32(eod)
        texts_BN = process_allgather(search_on(model, search, *of).texts_BWT[:, 0], tiled=True)
        return [trim(row, eod) for row in np.array(texts_BN)[: len(prompts)].tolist()]
    for first in range(0, max_tokens, chunk):
        turn = turn._replace(done_B=jax.device_put(done, layout.sharding("batch")))
        last = min(first + chunk, max_tokens)
        turn = decode(model, turn, sampling, np.uint32(seed), np.int32(last), np.int32(eod), greedy)
        out_BN, done = map(np.array, process_allgather((turn.out_BN, turn.done_B), tiled=True))
        new = [trim(row[:last], eod) for row in out_BN[: len(prompts)].tolist()]
        if ended:
            done[: len(prompts)] |= [ended(ids) for ids in new]
        if done.all():
            break
    return new


def check_writes(model: Any) -> None:
    if not model.cfg.causal:
        raise ConfigError(
            f"model.family={model.cfg.family!r} writes no text: each of its tokens sees the whole"
            " of it; call the model for logits of hidden words, or take a gpt"
        )


class Turn(NamedTuple):
    """Where the rows of a batch are. out [B, S]: new tokens; at [B]: position of the next.

    memory: what an encoder has read; None without one.
    """

    cache: Cache | tuple[Cache, ...]
    memory: Any
    logits_BV: jax.Array
    seen_BV: jax.Array
    at_B: jax.Array
    out_BN: jax.Array
    done_B: jax.Array
    n: jax.Array


@partial(jax.jit, static_argnames="slots")
def prefill(
    model: Any, tokens_BP: jax.Array, seen_BV: jax.Array, lengths_B: jax.Array, start: jax.Array,
    slots: int,
) -> Turn:  # fmt: skip
    B = tokens_BP.shape[0]
    h_B1D, cache, at_B, memory = model.prefill(tokens_BP, lengths_B, start, slots)
    out_BN = jnp.full((B, slots), -1, jnp.int32)
    logits_BV = model.logits(h_B1D)[:, 0]
    if layers_apart(model):
        cache, memory = cache.split(), memory and memory.split()
    done_B = jnp.zeros(B, bool)
    return Turn(cache, memory, logits_BV, seen_BV, at_B, out_BN, done_B, jnp.int32(0))


def layers_apart(model: Any) -> bool:
    """XLA:CPU takes a copy of what it slices: in every turn, all weights and caches of a stack."""
    return not model.layout.on_gpu()


@partial(jax.jit, static_argnames="greedy", donate_argnames="turn")
def decode(
    model: Any, turn: Turn, sampling: Sampling, seed: jax.Array, last: jax.Array, eod: jax.Array,
    greedy: bool,
) -> Turn:  # fmt: skip
    """Adds tokens to each row until `last` of them, or eod_id."""
    B = turn.at_B.shape[0]
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(B))

    blocks = model.apart() if layers_apart(model) else None  # once, before the loop

    def add(turn: Turn) -> Turn:
        keys = jax.vmap(jax.random.fold_in)(keys_B, turn.at_B)
        token_B = choose(turn.logits_BV, turn.seen_BV, sampling, keys, greedy)
        token_B = jnp.where(turn.done_B, eod, token_B)
        h_B1D, cache = model.extend(
            token_B[:, None], turn.at_B[:, None], turn.cache, blocks, turn.memory
        )
        seen_BV = turn.seen_BV | (jnp.arange(turn.seen_BV.shape[1]) == token_B[:, None])
        done_B = turn.done_B | (token_B == eod)
        out_BN = turn.out_BN.at[:, turn.n].set(token_B)
        logits_BV = model.logits(h_B1D)[:, 0]
        more = turn.at_B + 1, out_BN, done_B, turn.n + 1
        return Turn(cache, turn.memory, logits_BV, seen_BV, *more)

    return jax.lax.while_loop(lambda turn: (turn.n < last) & ~turn.done_B.all(), add, turn)


def check(
    prompts: Sequence[Sequence[int]], max_tokens: int, cfg: ModelConfig, s: Sampling, seed: int,
    beams: int, length_penalty: float,
) -> None:  # fmt: skip
    """Raises one ConfigError with everything that cannot be carried out."""
    values = {"max_tokens": max_tokens, "seed": seed, "beams": beams} | s._asdict()
    ranges = [
        ("max_tokens", max_tokens >= 1, "at least 1"),
        ("seed", 0 <= seed < 2**32, "from 0 to 2**32 - 1"),
        ("temperature", 0 <= s.temperature <= 1000, "from 0, greedy, to 1000"),
        ("top_k", 0 <= s.top_k < 2**31, "at least 0; 0 is off"),
        ("top_p", 0 < s.top_p <= 1, "above 0 and at most 1; 1 is off"),
        ("repetition_penalty", s.repetition_penalty > 0, "above 0; 1 is off"),
        ("beams", 1 <= 2 * beams <= cfg.vocab_size, f"from 1 to {cfg.vocab_size // 2}"),
    ]
    problems = [
        f"{name}={values[name]} must be {range_}" for name, good, range_ in ranges if not good
    ]
    if not -100 <= length_penalty <= 100:
        problems.append(f"length_penalty={length_penalty} must be from -100 to 100; 1 is a mean")
    if beams > 1:
        problems += [
            f"{name}={values[name]} does nothing with beams={beams}, which draw nothing; try {off}"
            for name, off in Sampling(0.0)._asdict().items()
            if values[name] != off
        ]
    elif length_penalty != 1:
        problems.append(f"length_penalty={length_penalty} does nothing without beams; try beams=4")
    if cfg.seq2seq and max_tokens > cfg.target_len:
        problems.append(
            f"max_tokens={max_tokens} exceeds model.target_len={cfg.target_len}, the context of the"
            f" decoder; try max_tokens={cfg.target_len}"
        )
    for i, prompt in enumerate(prompts):
        n, most = len(prompt), cfg.seq_len if cfg.seq2seq else cfg.seq_len - 1
        if not prompt:
            problems.append(f"prompt {i} is empty; give at least one token")
        elif n > most:
            problems.append(f"prompt {i} has {n} tokens, the context is {cfg.seq_len}; shorten it")
        elif not cfg.seq2seq and n + max_tokens > cfg.seq_len:
            problems.append(
                f"prompt {i} has {n} tokens; with max_tokens={max_tokens} they exceed the"
                f" context of {cfg.seq_len}; try max_tokens={cfg.seq_len - n}"
            )
        if any(not 0 <= t < cfg.vocab_size for t in prompt):
            problems.append(f"prompt {i} has ids beyond model.vocab_size={cfg.vocab_size}")
    if problems:
        raise ConfigError("; ".join(problems))


def round_up(n: int, least: int, cap: int | None) -> int:
    """The next of least, 2 least, 4 least, ..., but not above cap."""
    size = least
    while size < n:
        size *= 2
    return size if cap is None else min(size, cap)


def trim(row: list[int], eod: int) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in (eod, -1)]
    return row[: ends[0]] if ends else row


def _until(text: str, stop: Sequence[str]) -> str:
    return text[: min([text.find(s) for s in stop if s in text], default=len(text))]
