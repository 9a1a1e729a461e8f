"""JSON files of checkpoints, read so that every way to be wrong is an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_multiverse.config import ModelConfig
from megatron_multiverse.config.strict import dataclass_from_mapping
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.files import is_lfs_pointer


def read_json_object(file: str | Path) -> dict[str, Any]:
    """A JSON object. A byte order mark at its start is no part of it.

    Raises:
        CheckpointError: the file cannot be read, is not JSON or holds something else.
    """
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}): check its name and your rights") from error
    except (ValueError, RecursionError) as error:
        refuse_lfs_pointer(Path(file))
        raise CheckpointError(f"{file} is not valid JSON ({error}): copy or download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds {type(values).__name__}, expected a JSON object")
    return values


def refuse_lfs_pointer(file: Path) -> None:
    """Raise CheckpointError if the file is what git leaves in place of a large one that was not fetched."""
    if is_lfs_pointer(file):
        raise CheckpointError(f"{file} is a git-lfs pointer, not the file itself: run git lfs pull in its folder")


def read_model_config(file: str | Path) -> ModelConfig:
    """The ModelConfig that `ModelConfig.to_json` wrote.

    Raises:
        CheckpointError: see `read_json_object`.
        ConfigError: unknown, missing or mistyped keys.
    """
    return dataclass_from_mapping(ModelConfig, read_json_object(file), where=str(file))
