"""Reading a Hugging Face tokenizer: the files of a folder, or those of a name on the hub.

Where there is a tokenizer.json it is read as it is. transformers is asked only where there is none: beside the
config.json of some models its AutoTokenizer makes a tokenizer of the model's class, which cuts text otherwise.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_multiverse.data.hub import asking_hub
from megatron_multiverse.data.input_files import refuse_lfs_pointer
from megatron_multiverse.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_OF_TOKENIZERS = ("tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""What transformers makes a tokenizer of where there is no tokenizer.json."""
_READ = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_GENERAL_CLASSES = ("", "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
"""Classes in tokenizer_config.json, without the ending "Fast", that do not say how text is cut."""
_ADDED_TOKEN = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def load_hf_backend(model: Path) -> tuple[Any, dict[str, Any]]:
    """The Rust tokenizer and what tokenizer_config.json says of special tokens and template.

    Raises:
        ConfigError: there is no tokenizer, or its files are damaged.
    """
    file = model / "tokenizer.json" if model.is_dir() else model
    whole = model.parent / "tokenizer.json"  # not with_name, which "." has none for
    if file == model != whole and file.suffix == ".json" and whole.is_file():
        raise ConfigError(f"{model} is no tokenizer: give its folder, {model.parent}")
    if file.is_file() and file.suffix == ".json":
        return _load_tokenizer_json(file), _read_config(file)
    if model.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)):
        return _load_by_transformers(model, model)
    with asking_hub() as why_not:
        snapshot = _fetch(str(model), why_not)
        file = snapshot / "tokenizer.json"
        if file.is_file():
            return _load_tokenizer_json(file), _read_config(file)
        return _load_by_transformers(model, snapshot)


def _fetch(name: str, why_not: str) -> Path:
    """The folder of a model on the hub in the cache of the hub, with the files that are read here, if it has them.

    Args:
        name: of the model.
        why_not: why the hub is not asked; empty where it is.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_READ)))
    except LocalEntryNotFoundError as error:
        reason = why_not or first_line(error)
        raise ConfigError(
            f"no Hugging Face tokenizer at {name}: it is no folder here, and the hub's cache does not hold it, while "
            f"{reason}: give a folder with tokenizer.json, or run `hf download {name}` where there is a network"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Hugging Face tokenizer at {name}: give a folder with tokenizer.json or a hub name ({error})"
        ) from error


def _load_tokenizer_json(file: Path) -> Any:
    from tokenizers import Tokenizer

    refuse_lfs_pointer(file)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{file} is damaged or no tokenizer.json ({error}): fetch it again") from error


def _read_config(file: Path) -> dict[str, Any]:
    """tokenizer_config.json beside a tokenizer.json, with what other files say of the same.

    As in transformers, special_tokens_map.json overrides the names of special tokens where the config has no table
    `added_tokens_decoder`, and is not looked at where it has one.
    """
    template_file = file.with_name("chat_template.jinja")
    found = _read_object(file.with_name("tokenizer_config.json"))
    if "added_tokens_decoder" not in found:
        named = _read_object(file.with_name("special_tokens_map.json"))
        found |= {name: named[name] for name in SPECIAL_TOKENS if name in named}
    if template_file.is_file():
        found["chat_template"] = _read_text(template_file)
    return found


def _read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is none."""
    if not file.is_file():
        return {}
    try:
        found: Any = json.loads(_read_text(file))
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}): fetch it again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds a {type(found).__name__}, not an object: fetch it again")
    return found


def _read_text(file: Path) -> str:
    refuse_lfs_pointer(file)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text ({error}): fetch it again") from error


def _load_by_transformers(model: Path, folder: Path) -> tuple[Any, dict[str, Any]]:
    """What transformers makes of `model`, a folder, a file or a hub name; `folder` has its tokenizer_config.json."""
    if model.is_dir() and not any((model / name).is_file() for name in _OF_TOKENIZERS):
        inner = sorted(file.parent for file in model.glob("*/tokenizer.json"))
        hint = f"{inner[-1]} has one" if inner else "give a folder with tokenizer.json, or a hub name"
        raise ConfigError(f"no Hugging Face tokenizer at {model}, a folder without tokenizer.json: {hint}")
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(model), use_fast=True)
    except Exception as error:  # what the many tokenizer classes raise is not one family of errors
        if (model / "tokenizer.model").is_file() or model.suffix == ".model":
            raise ConfigError(
                f"{model} is a sentencepiece model without tokenizer.json: use --tokenizer-type SentencePieceTokenizer"
            ) from error
        raise ConfigError(
            f"no Hugging Face tokenizer at {model}: give a folder with tokenizer.json or a hub name ({error})"
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise ConfigError(f"{model} has no fast tokenizer; convert it to a tokenizer.json first")
    _warn_of_another_class(model, loaded, _read_object(folder / "tokenizer_config.json").get("tokenizer_class"))
    config = {name: getattr(loaded, name) for name in SPECIAL_TOKENS if getattr(loaded, name, None) is not None}
    config["chat_template"] = loaded.chat_template
    # A copy: adding our tags must not change the object that transformers may share.
    return Tokenizer.from_str(loaded.backend_tokenizer.to_str()), config


def _warn_of_another_class(model: Path, loaded: Any, declared: Any) -> None:
    """Without a tokenizer.json the class says how text is cut; transformers 5 does not always take the declared one."""
    named, made = (str(name or "").removesuffix("Fast") for name in (declared, type(loaded).__name__))
    if named in (*_GENERAL_CLASSES, made) or made in _GENERAL_CLASSES:
        return
    logger.warning(
        "%s: transformers takes the tokenizer of its config.json, %s, in place of %s, which its tokenizer_config.json "
        "names; they may cut text differently. If %s is right, write its tokenizer.json and give that folder: "
        "transformers.%s.from_pretrained(%r).save_pretrained(FOLDER)",
        model, made, named, named, named, str(model),
    )  # fmt: skip


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


UnicodeForm = Literal["", "NFC", "NFD", "NFKC", "NFKD"]


def kept_form(backend: Any) -> UnicodeForm | None:
    """The Unicode form a text must have so that this tokenizer keeps it byte for byte, if that is all it takes.

    Returns:
        "NFC" and the like for a byte-level tokenizer that does nothing but normalize; "" if it does not even do that;
        None if more would have to be known.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    def kinds(part: Any, children: str) -> list[dict[str, Any]]:
        if part is None:
            return []
        state = json.loads(part.__getstate__())  # what pickle would write: the part of tokenizer.json
        return list(state[children]) if state["type"] == "Sequence" else [state]

    cutters = kinds(backend.pre_tokenizer, "pretokenizers")
    keeps = all(
        (cutter["type"] == "ByteLevel" and not cutter["add_prefix_space"])
        or (cutter["type"] == "Split" and cutter["behavior"] != "Removed")
        or cutter["type"] == "Digits"
        for cutter in cutters
    )
    is_whole = all(backend.token_to_id(letter) is not None for letter in ByteLevel.alphabet())
    swallows = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    if not keeps or not is_whole or swallows or "ByteLevel" not in {cutter["type"] for cutter in cutters}:
        return None
    forms = [part["type"] for part in kinds(backend.normalizer, "normalizers")]
    if not forms:
        return ""
    return forms[0] if len(forms) == 1 and forms[0] in ("NFC", "NFD", "NFKC", "NFKD") else None


def content(token: Any) -> str | None:
    """tokenizer_config.json writes a special token as a string or as {"content": ...}."""
    return token.get("content") if isinstance(token, dict) else token
