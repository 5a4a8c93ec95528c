"""What goes with a tokenizer: tokenizer_config.json, and the files beside it that say the same."""

import json
from collections.abc import Mapping
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
    config = _object(folder / "special_tokens_map.json") | _object(folder / "tokenizer_config.json")
    if added := _object(folder / "added_tokens.json"):
        entries = {str(id): {"content": name, "special": True} for name, id in added.items()}
        config.setdefault("added_tokens_decoder", entries)
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config


def name_of(config: Mapping[str, Any], role: str) -> str | None:
    """What the config calls the token of this role."""
    named = config.get(f"{role}_token")
    return named.get("content") if isinstance(named, dict) else named


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


def _object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise DataError(f"{file.name}: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file.name} holds no JSON object")
    return content
