"""What generation_config.json in the folder of a model says: which ids end an answer, and how answers are drawn."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import ConfigError

logger = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"
DRAWN = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
}
"""What it may say of drawing, with the smallest and largest value."""


def sampling_defaults(folder: Path) -> dict[str, float]:
    """How the model's authors draw answers: those of `DRAWN` that generation_config.json names; nothing if it does not
    draw (`do_sample`).

    Args:
        folder: of the model.

    Raises:
        ConfigError: the file is damaged, or a value is none.
    """
    named = _read(folder)
    if not named.get("do_sample"):
        return {}
    found = {name: named[name] for name in DRAWN if named.get(name) is not None}
    for name, value in found.items():
        low, high = DRAWN[name]
        if type(value) not in (int, float) or not low <= value <= high or (name == "repetition_penalty" and not value):
            raise ConfigError(f"{folder / GENERATION_FILE}: {name} {value!r} does not lie in {low} to {high}; mend it")
    return found


def _read(folder: Path) -> dict[str, Any]:
    path = folder / GENERATION_FILE
    if not path.is_file():
        return {}
    try:
        named = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path}: not a JSON object ({error}); mend or delete it") from error
    if not isinstance(named, dict):
        raise ConfigError(f"{path}: not a JSON object, but {type(named).__name__}; mend or delete it")
    return named


def end_ids(folder: Path, tokenizer: MultiverseTokenizer) -> list[int]:
    """Ids that generation_config.json names as ends of an answer, beside the tokenizer's own.

    Args:
        folder: of the model.
        tokenizer: of the model.

    Raises:
        ConfigError: the file is damaged, or names what the tokenizer does not have.
    """
    path, named = folder / GENERATION_FILE, _read(folder).get("eos_token_id")
    ids = [] if named is None else named if isinstance(named, list) else [named]
    for token in ids:
        if type(token) is not int or not 0 <= token < tokenizer.vocab_size:
            raise ConfigError(
                f"{path}: eos_token_id {token!r} is no id of the tokenizer (0 to {tokenizer.vocab_size - 1}); mend it"
            )
    ends = [*([] if tokenizer.eod is None else [tokenizer.eod]), *ids]
    logger.info("answers end at: %s", ", ".join(dict.fromkeys(tokenizer.id_to_text[token] for token in ends)) or "none")
    return ids
