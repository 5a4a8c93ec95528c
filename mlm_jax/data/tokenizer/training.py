"""A byte-level BPE vocabulary learned from texts."""

from collections.abc import Iterable, Sequence

from tokenizers import normalizers, pre_tokenizers, trainers

from mlm_jax.data.tokenizer.byte_level import byte_level_backend
from mlm_jax.data.tokenizer.fast import FastTokenizer
from mlm_jax.data.tokenizer.settings import END_OF_DOCUMENT
from mlm_jax.data.tokenizer.split_patterns import PYTHON
from mlm_jax.errors import DataError


def train_bpe(
    texts: Iterable[str], vocab_size: int, special: Sequence[str] = END_OF_DOCUMENT[:1], *,
    lowercase: bool = False,
) -> FastTokenizer:  # fmt: skip
    """Byte-level BPE learned from these texts; any text can be encoded.

    special: tokens with the ids 0, 1, ..., found in a text by their names; by default the end of a
    document alone. lowercase: texts are read in lower case, and as if a space was before them, so
    that the first word of a sentence is no other than that word elsewhere.

    The vocabulary is smaller than vocab_size where the texts do not repeat themselves enough.
    Raises DataError for a vocab_size below len(special) + 256 bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < (least := len(special) + len(alphabet)):
        kinds = f"the {len(special)} special tokens" if len(special) > 1 else "the special token"
        raise DataError(f"vocab_size={vocab_size} is less than {kinds} and 256 bytes: {least}")
    backend = byte_level_backend({}, [], PYTHON)
    if lowercase:
        steps = [normalizers.Lowercase(), normalizers.Prepend(" ")]
        backend.normalizer = normalizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return FastTokenizer(backend)
