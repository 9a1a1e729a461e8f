"""Prompts from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.files import read_lines


def read_prompts(file: Path, kinds: type | tuple[type, ...] = str) -> list[Any]:
    """The field `prompt` of each line of JSON.

    Args:
        file: JSON Lines; empty ones are passed over.
        kinds: what a prompt may be: a text, or a list of ids too.

    Raises:
        ConfigError: no such file, a line without that field, or no line at all; the message names it.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: {'a folder' if file.is_dir() else 'no such file'}; name one with prompts")
    prompts = []
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, kinds):
            what = "a text" if kinds is str else "a text or a list of ids"
            raise ConfigError(f"{file}, line {number}: give a JSON object with {what} in its field prompt")
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{file}: no line in it; give a JSON object with a field prompt in each")
    return prompts
