"""An excerpt of a corpus: what a tokenizer is trained on where not all of it is needed."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlm_jax.data.preprocess.documents import read_documents
from mlm_jax.data.preprocess.inputs import expand, parts, total_size
from mlm_jax.errors import DataError

LONGEST = 1 << 26  # bytes of a document; of a longer one, nothing is learned


def excerpt(
    inputs: Sequence[Path | str], json_keys: Sequence[str], max_bytes: int
) -> Iterator[str]:
    """Texts of about max_bytes together, from all over the input.

    Each part of the input gives its beginning, by its share of all bytes; a stream, its beginning
    alone. Raises DataError as `mlm_jax.data.preprocess.build` does.
    """

    def refuse(problem: str) -> None:
        raise DataError(problem)

    files = expand(inputs)
    total, left = total_size(files), max_bytes
    for part in parts(files, json_keys, LONGEST, None, lambda: None):
        share = -(-max_bytes * part.size // total) if total else left
        read = (read_documents(piece, json_keys, LONGEST, refuse) for piece in part.pieces)
        for document in itertools.chain.from_iterable(read):
            if min(share, left) <= 0:
                break
            share, left = share - document.text_bytes, left - document.text_bytes
            yield from document.texts
        if left <= 0:
            return
