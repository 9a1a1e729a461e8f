"""Answers of a run of reinforcement learning in the terminal: a table of all, and one of them segment by segment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.files import read_lines
from megatron_multiverse.inference import from_record

_COLUMNS = "{:>5} {:>5} {:>8} {:>10} {:>6} {:>7} {:>8} {:>7}  {}"


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of a file.

    Raises:
        ConfigError: there is no such file, or nothing in it.
        DataError: a line is no record; the message names it.
    """
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no such file"
        raise ConfigError(f"{file}: {what}; name rollouts.jsonl of a run (rollout.keep_records must be above 0)")
    records = []
    for number, line in enumerate(read_lines(file), 1):
        try:
            record = json.loads(line)
            from_record(record)
        except (ValueError, DataError) as error:
            raise DataError(f"{file}, line {number}: {error}") from error
        records.append(record)
    if not records:
        raise ConfigError(f"{file} is empty: no step has been kept yet")
    return records


def table(records: list[dict[str, Any]], *, first: int = 1) -> Iterator[str]:
    """One line for each record, the first of which stands in line `first` of its file.

    Records of tools/generate.py have no step and no reward.
    """
    yield _COLUMNS.format("line", "step", "reward", "advantage", "blocks", "tokens", "critical", "finish", "prompt")
    for number, record in enumerate(records, first):
        numbers = (f"{record[name]:.3f}" if name in record else "" for name in ("reward", "advantage"))
        yield _COLUMNS.format(
            number, record.get("step", ""), *numbers, len(record["blocks"]), len(record["token_ids"]),
            record["critical_tokens"], record["finish_reason"], " ".join(record.get("prompt", "").split())[:60],
        )  # fmt: skip


def segments(record: dict[str, Any], tokenizer: MultiverseTokenizer) -> Iterator[str]:
    """An answer segment by segment, indented by depth: branch, version of the weights, mean log-probability of the
    tokens that were drawn, text."""
    result = from_record(record)
    found = record["segments"]
    ends = [*(segment["start"] for segment in found[1:]), len(result.token_ids)]
    for segment, end in zip(found, ends, strict=True):
        start, indent = segment["start"], "    " * len(segment["path"])
        drawn = [logprob for logprob in result.logprobs[start:end] if logprob is not None]
        mean = f"{round(sum(drawn) / len(drawn), 4) + 0:.4f}" if drawn else "none drawn"
        first, last = segment["weight_versions"]
        versions = f"{first}" if first == last else f"{first} to {last}"
        branch = segment["branch"] or "root"
        yield f"{indent}-- {branch}: {end - start} tokens, weights {versions}, log-probability {mean}"
        yield from (indent + line for line in tokenizer.detokenize(result.token_ids[start:end]).strip("\n").split("\n"))
