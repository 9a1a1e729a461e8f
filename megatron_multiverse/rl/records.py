"""rollouts.jsonl of a run: answers as records, each with what it earned, every step once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from megatron_multiverse.files import naming, write_line
from megatron_multiverse.inference import to_record
from megatron_multiverse.rl.rollout import Batch

logger = logging.getLogger(__name__)

ROLLOUTS_FILE = "rollouts.jsonl"


def keep_records_until(file: Path, step: int) -> None:
    """Cut a file of records off after those of `step`: a run that goes on from there draws the later ones again. What a
    killed run left of a last line goes, too.

    Raises:
        OSError: it cannot be written.
    """
    if not file.is_file():
        return
    with naming(file), open(file, "rb+") as stream:
        kept = removed = 0
        for line in stream:
            removed += not _is_record_until(line, step)
            kept += 0 if removed else len(line)
        if removed:
            stream.truncate(kept)
            logger.info("%s: %d answers after step %d are taken out, which are drawn again", file, removed, step)


def _is_record_until(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def write_records(file: Path, batch: Batch, step: int, count: int) -> None:
    """Append the first `count` answers of a step to a file of records, each with what it earned."""
    lines: list[dict[str, Any]] = []
    for group in batch.groups[:count]:
        for k, result in enumerate(group.results):
            earned = {"correct": group.correct[k], "reward": group.rewards[k], "advantage": group.advantages[k]}
            about = {"step": step, "prompt": group.prompt.text, "gold": group.prompt.gold, "text": group.texts[k]}
            lines.append({**about, **earned, **to_record(result)})
    with naming(file), open(file, "a", encoding="utf-8") as stream:
        for line in lines[:count]:
            write_line(stream, json.dumps(line, ensure_ascii=False))
