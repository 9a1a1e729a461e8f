"""Which ids end an answer, as the folder of a model says."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import ConfigError

logger = logging.getLogger(__name__)


def end_ids(folder: Path, tokenizer: MultiverseTokenizer) -> list[int]:
    """Ids that generation_config.json names as ends of an answer, beside the tokenizer's own.

    Args:
        folder: of the model.
        tokenizer: of the model.

    Raises:
        ConfigError: the file is damaged, or names what the tokenizer does not have.
    """
    path = folder / "generation_config.json"
    named: Any = None
    if path.is_file():
        try:
            named = json.loads(path.read_text(encoding="utf-8-sig")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: not a JSON object ({error}); mend or delete it") from error
    ids = [] if named is None else named if isinstance(named, list) else [named]
    for token in ids:
        if type(token) is not int or not 0 <= token < tokenizer.vocab_size:
            raise ConfigError(
                f"{path}: eos_token_id {token!r} is no id of the tokenizer (0 to {tokenizer.vocab_size - 1}); mend it"
            )
    ends = [*([] if tokenizer.eod is None else [tokenizer.eod]), *ids]
    logger.info("answers end at: %s", ", ".join(dict.fromkeys(tokenizer.id_to_text[token] for token in ends)) or "none")
    return ids
