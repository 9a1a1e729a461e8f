"""Reading a Hugging Face tokenizer: the files of a folder, or a hub name through transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_multiverse.errors import ConfigError

_ADDED_TOKEN = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def load_hf_backend(model: Path) -> tuple[Any, dict[str, Any]]:
    """The Rust tokenizer and what tokenizer_config.json says of special tokens and template."""
    from tokenizers import Tokenizer

    file = model / "tokenizer.json" if model.is_dir() else model
    if file.is_file() and file.suffix == ".json":
        config_file = file.with_name("tokenizer_config.json")
        template_file = file.with_name("chat_template.jinja")
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        if template_file.is_file():
            config["chat_template"] = template_file.read_text(encoding="utf-8")
        return Tokenizer.from_file(str(file)), config
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(model), use_fast=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Hugging Face tokenizer at {model}: give a folder with tokenizer.json or a hub name ({error})"
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise ConfigError(f"{model} has no fast tokenizer; convert it to a tokenizer.json first")
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    config = {name: getattr(loaded, name) for name in names if getattr(loaded, name, None) is not None}
    config["chat_template"] = loaded.chat_template
    # A copy: adding our tags must not change the object that transformers may share.
    return Tokenizer.from_str(loaded.backend_tokenizer.to_str()), config


def completed_config(config: Mapping[str, Any], added: Mapping[int, Any]) -> dict[str, Any]:
    """tokenizer_config.json as it must stand beside a tokenizer.json with these added tokens.

    Where there is a table `added_tokens_decoder`, some classes of transformers build the tokenizer from that table and
    do not look at the added tokens of tokenizer.json, so it must hold all of them. Without the table they do look.
    The names that only transformers 5 writes are replaced by those that transformers 4 reads too.

    Args:
        config: the values as they were.
        added: added tokens by id (tokenizers.AddedToken).
    """
    values = dict(config)
    if "added_tokens_decoder" in values:
        table = {str(token): {name: getattr(entry, name) for name in _ADDED_TOKEN} for token, entry in added.items()}
        values["added_tokens_decoder"] = {**values["added_tokens_decoder"], **table}
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    return values


def content(token: Any) -> str | None:
    """tokenizer_config.json writes a special token as a string or as {"content": ...}."""
    return token.get("content") if isinstance(token, dict) else token


def default_template(template: Any) -> str | None:
    """tokenizer_config.json holds one template or a list of named ones."""
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template if template is None else str(template)
