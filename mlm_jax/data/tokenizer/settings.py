"""What goes with a tokenizer: tokenizer_config.json, and the files beside it that say the same."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from mlm_jax.errors import DataError

ROLES = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")
END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # the first there is
BERT = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; what it lacks, from special_tokens_map.json and added_tokens.json.

    chat_template.jinja, where newer versions of transformers keep it, is preferred to the config's.
    All of it is data: nothing named in it is imported or run. Raises DataError.
    """
    config = _object(folder / "tokenizer_config.json")
    config = _object(folder / "special_tokens_map.json") | config
    if added := _object(folder / "added_tokens.json"):
        entries = {str(id): {"content": name, "special": True} for name, id in added.items()}
        config.setdefault("added_tokens_decoder", entries)
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    for role in ROLES:
        named = _name(config, role)
        if not (named is None or isinstance(named, str)):
            raise DataError(
                f"{folder / 'tokenizer_config.json'}: this tokenizer cannot be read: {role}_token="
                f'{config[f"{role}_token"]!r} names no token; give its text, as "</s>"'
            )
    return config


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Written after the tokenizer's own file, so that a folder that has it is complete."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def special_ids(config: Mapping[str, Any], id_of: Callable[[str], int | None]) -> dict[str, int]:
    """The ids of the roles that the config names, else that have BERT's names, and that exist."""
    found = {role: id_of(_name(config, role) or BERT.get(role, "")) for role in ROLES}
    return {role: id for role, id in found.items() if id is not None}


def end_of_document(special: Mapping[str, int], id_of: Callable[[str], int | None]) -> int | None:
    """The id that ends a document: one of END_OF_DOCUMENT, else EOS, else SEP.

    SEP is BERT's: it has no EOS, and Megatron's HuggingFaceTokenizer takes SEP there. (Megatron's
    older BertWordPiece adds an [EOS] behind the vocabulary, which no published weights know.)
    """
    ends = (id_of(name) for name in END_OF_DOCUMENT)
    first = next((id for id in ends if id is not None), None)
    return special.get("eos", special.get("sep")) if first is None else first


def added_tokens(config: Mapping[str, Any]) -> dict[int, tokenizers.AddedToken]:
    """The tokens in added_tokens_decoder by their ids, ascending. Raises DataError."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    entries = config.get("added_tokens_decoder") or {}
    try:
        return {
            int(id): tokenizers.AddedToken(e["content"], **{f: e[f] for f in flags if f in e})
            for id, e in sorted(entries.items(), key=lambda entry: int(entry[0]))
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(
            'added_tokens_decoder of tokenizer_config.json is no map like {"5": {"content": "<x>"}}'
        ) from None


def _name(config: Mapping[str, Any], role: str) -> Any:
    named = config.get(f"{role}_token")
    return named.get("content", named) if isinstance(named, dict) else named


def _object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file}: this tokenizer cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: this tokenizer cannot be read: it holds no JSON object")
    return content
