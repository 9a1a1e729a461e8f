"""Rows of the input as samples, and samples as rows of the output."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_multiverse.curation.pipeline import Passed
from megatron_multiverse.curation.trees import plain_text, think
from megatron_multiverse.data.readers import RawRow, read_rows
from megatron_multiverse.data.sources import Source, column_names
from megatron_multiverse.errors import ConfigError

PARALLEL = "deepseek_thinking_trajectory_parallel"
SEQUENTIAL = "deepseek_thinking_trajectory_sequential"
"""Names of Multiverse-1K, which preprocessing knows, whoever wrote the chain."""


@dataclass(frozen=True)
class ChainColumns:
    """Which columns hold what; `question` and `answer` may be missing."""

    chain: str
    question: str | None = None
    answer: str | None = None


KNOWN = (
    ChainColumns("deepseek_thinking_trajectory", "question", "deepseek_attempt"),
    ChainColumns("response", "prompt"),
)


@dataclass(frozen=True)
class Sample:
    """One row of the input."""

    name: str
    """Its number and a hash of its chain: another chain in this row is another sample."""
    row: int
    """From 1, over the whole input."""
    chain: str
    fields: Mapping[str, Any]
    problem: str = ""
    """Why the row cannot be used; empty if it can."""


def choose_columns(source: Source, json_keys: Sequence[str] | None) -> ChainColumns:
    """Those asked for, else the first known set that the input has.

    Args:
        source: the input.
        json_keys: one key (chain), two (question, chain) or three (question, chain, answer).

    Raises:
        ConfigError: the input has none of them.
    """
    if source.is_trajectories:
        return KNOWN[-1]
    names = column_names(source)
    if json_keys:
        return _named_columns(names, json_keys)
    for columns in KNOWN:
        if {columns.chain, columns.question, columns.answer} - {None} <= set(names):
            return columns
    raise ConfigError(
        f"the input has the columns {sorted(names)}; known are those of s1K-1.1 (question, "
        "deepseek_thinking_trajectory, deepseek_attempt) and prompt, response. Name yours: --json-keys QUESTION CHAIN "
        "ANSWER"
    )


def _named_columns(names: Collection[str], keys: Sequence[str]) -> ChainColumns:
    if missing := [key for key in keys if key not in names]:
        raise ConfigError(f"--json-keys names {missing}, but the input has the columns {sorted(names)}")
    if len(keys) == 1:
        return ChainColumns(keys[0])
    if len(keys) == 2:
        return ChainColumns(keys[1], keys[0])
    if len(keys) == 3:
        return ChainColumns(keys[1], keys[0], keys[2])
    raise ConfigError(f"--json-keys takes one key (chain), two (question chain) or three with the answer, not {keys}")


def read_samples(source: Source, columns: ChainColumns, limit: int | None = None) -> Iterator[Sample]:
    """The samples of the input, in order.

    Args:
        source: the input.
        columns: which columns hold what.
        limit: only so many.
    """
    number = 0
    for shard in source.shards:
        for raw in read_rows(shard):
            if raw.is_blank:
                continue
            if limit is not None and number >= limit:
                return
            number += 1
            yield _sample(number, raw, columns)


def _sample(number: int, raw: RawRow, columns: ChainColumns) -> Sample:
    chain = raw.fields.get(columns.chain)
    text = chain if isinstance(chain, str) else ""
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return Sample(f"{number:06d}-{digest}", number, text, raw.fields, _problem(raw, columns, text))


def _problem(raw: RawRow, columns: ChainColumns, text: str) -> str:
    if raw.error is not None:
        return str(raw.error)
    if not text.strip():
        return f"column {columns.chain!r} holds no text"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"column {columns.chain!r} holds half of a surrogate pair at character {error.start}"
    return ""


def output_columns(sample: Sample, columns: ChainColumns, passed: Passed) -> dict[str, Any]:
    """What the output row has beyond the fields of the input."""
    parallel, sequential = think(passed.parts), plain_text(passed.parts)
    distance = {"distance": passed.details["distance"]}
    question = sample.fields.get(columns.question or "", "")
    if columns.answer is None:
        return {"prompt": question, "response": parallel, "response_sequential": sequential, **distance}
    answer = sample.fields.get(columns.answer)
    return {"question": question, "deepseek_attempt": answer, PARALLEL: parallel, SEQUENTIAL: sequential, **distance}
