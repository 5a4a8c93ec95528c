"""The `tokenizers` backend of each kind of vocabulary file that has one of its own there."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mlm_jax.data.tokenizer.byte_level import byte_level_backend, characters
from mlm_jax.data.tokenizer.settings import BERT, END_OF_DOCUMENT, added_tokens
from mlm_jax.data.tokenizer.split_patterns import GPT2
from mlm_jax.errors import DataError


def read_json(file: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Hugging Face's tokenizer.json, which says all by itself."""
    return tokenizers.Tokenizer.from_file(str(file))


def read_merges(file: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's vocab.json and merges.txt, given either; gpt2-vocab.json and gpt2-merges.txt too."""
    name = file.name.removesuffix("vocab.json").removesuffix("merges.txt")
    both = [file.with_name(name + kind) for kind in ("vocab.json", "merges.txt")]
    if lacking := [one.name for one in both if not one.is_file()]:
        raise DataError(f"{lacking[0]} is not beside it; add it, or give a tokenizer.json")
    vocab, merges = models.BPE.read_file(*map(str, both))
    added = extend(vocab, config, END_OF_DOCUMENT)
    return marked(byte_level_backend(vocab, merges, GPT2), added)


def read_wordpiece(file: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BERT's vocab.txt, one token a line.

    Letters are kept as they are where do_lower_case in the config says so, or, where it says
    nothing, where the vocabulary has capitals. Raises DataError.
    """
    vocab: dict[str, int] = {}
    for number, line in enumerate(file.read_bytes().decode().split("\n"), start=1):
        token = line.rstrip("\r")
        if token in vocab:
            raise DataError(f"line {number}: {token!r} is there twice; give each a line of its own")
        if token:
            vocab[token] = number - 1
    if BERT["unk"] not in vocab:
        raise DataError("no line is [UNK], as in BERT's vocab.txt")
    ordinary = (token for token in vocab if not token.startswith("["))
    lowercase = config.get("do_lower_case", all(token == token.lower() for token in ordinary))
    added = extend(vocab, config, BERT.values())
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token=BERT["unk"]))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase,
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return marked(backend, added)


def bytes_backend() -> tokenizers.Tokenizer:
    """The ids of a text are its bytes; 256 is <|endoftext|>."""
    vocab = {characters(bytes([byte])): byte for byte in range(256)}
    backend = byte_level_backend(vocab, [], None)
    backend.add_special_tokens(list(END_OF_DOCUMENT[:1]))
    return backend


def extend(
    vocab: dict[str, int], config: Mapping[str, Any], known: Iterable[str]
) -> list[tokenizers.AddedToken]:
    """The config's added tokens, which get the ids that it names; else the known in the vocabulary.

    Raises DataError where such an id is that of another token.
    """
    names = {id: name for name, id in vocab.items()}
    added = added_tokens(config)
    for id, token in added.items():
        if (name := names.get(id, token.content)) != token.content:
            raise DataError(
                f"id {id} is {name!r} in the vocabulary, but {token.content!r} in"
                " tokenizer_config.json; one of the two is of another tokenizer"
            )
        vocab[token.content] = id
    return list(added.values()) or [
        tokenizers.AddedToken(name, special=True, normalized=False)
        for name in known
        if name in vocab
    ]


def marked(
    backend: tokenizers.Tokenizer, added: Iterable[tokenizers.AddedToken]
) -> tokenizers.Tokenizer:
    """With tokens that are found in a text before it is cut into words."""
    for token in added:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return backend
