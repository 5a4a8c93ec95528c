"""An excerpt of a corpus: what a tokenizer is trained on where not all of it is needed."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlm_jax.data.preprocess.documents import read_documents
from mlm_jax.data.preprocess.inputs import cut, expand, is_stream
from mlm_jax.errors import DataError

LONGEST = 1 << 26  # bytes of a document; of a longer one, nothing is learned


def excerpt(
    inputs: Sequence[Path | str], json_keys: Sequence[str], max_bytes: int
) -> Iterator[str]:
    """Texts of max_bytes together at most, from all over the input.

    Each part of the input gives its beginning, by its share of all bytes; a stream, its beginning
    alone. Raises DataError as `mlm_jax.data.preprocess.build` does.
    """
    files = expand(inputs)

    def refuse(problem: str) -> None:
        raise DataError(problem)

    with tempfile.TemporaryDirectory() as spool:
        left = max_bytes
        parts = cut(files, json_keys, Path(spool), None, lambda: None)
        if not any(map(is_stream, files)):
            parts = list(parts)  # so that their share is known
        total = sum(part.size for part in parts) if isinstance(parts, list) else None
        for part in parts:
            share = left if total is None else min(left, -(-max_bytes * part.size // total))
            for document in read_documents(part, json_keys, LONGEST, refuse):
                for text in document.texts:
                    given = text.encode()[:share].decode(errors="ignore")
                    share, left = share - len(given.encode()), left - len(given.encode())
                    yield given
                if share < 4:  # no character is longer
                    break
            part.forget()
            if left < 4:
                break
