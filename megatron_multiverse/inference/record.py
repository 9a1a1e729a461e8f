"""An answer as data: a record to keep as JSON and read back, and to train on.

A record has everything that `Result` has, in plain values, and two things that can be derived from it: for each token
its segment, and for each segment the one it follows. A segment is a stretch of text in which one branch neither forks
nor joins.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_multiverse.data.sft_dataset import Sample
from megatron_multiverse.errors import DataError
from megatron_multiverse.inference.text.result import (
    BlockResult,
    BranchResult,
    DroppedText,
    EndDraw,
    Result,
    StopMatch,
    TimelineSpan,
    TopLogprobs,
)
from megatron_multiverse.structure import StructureVocab, lay_out, parse

FORMAT = "multiverse-answer/1"
"""Name and version of the form of records."""

_PER_TOKEN = ("position_ids", "logprobs", "labels", "parents", "weight_versions")


def to_record(result: Result) -> dict[str, Any]:
    """An answer as values that JSON has."""
    record = {"format": FORMAT, **to_values(result)}
    record["sampled"] = [int(drawn) for drawn in result.sampled]
    record["segments"], record["segment_ids"] = _segments(result)
    return record


def to_values(result: Result) -> dict[str, Any]:
    """What `Result` holds as plain values, and nothing that can be derived: what travels between processes.

    Lists of tokens are those of the result, not copies.
    """
    values = dict(vars(result))  # `asdict` would copy the lists of tokens one number at a time
    values["blocks"] = [asdict(block) for block in result.blocks]
    values["dropped"] = [
        {"branch": list(branch.path), **branch.dropped._asdict()}
        for block in result.blocks
        for branch in block.branches
        if branch.dropped is not None
    ]
    for name in ("stops", "ends", "timeline"):
        values[name] = [entry._asdict() for entry in values[name]]
    values["malformed"] = dict(result.malformed)
    for block in values["blocks"]:
        for branch in block["branches"]:
            del branch["dropped"]
    return values


def from_record(record: dict[str, Any]) -> Result:
    """The answer that a record describes.

    Raises:
        DataError: it is no such record, of another version, or its parts do not fit together; the message says which.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f"not an answer record of the form {FORMAT}, but {found!r}; tools/generate.py --records and "
            "rollout.keep_records of reinforcement learning write such (in Python: `to_record`)"
        )
    names = [field.name for field in dataclasses.fields(Result)]
    if missing := [name for name in names if name not in record]:
        raise DataError(f"the answer record lacks {', '.join(missing)}; write it again with `to_record`")
    count = len(record["token_ids"])
    for name in _PER_TOKEN:
        if len(record[name]) != count:
            raise DataError(f"the answer record has {count} token_ids and {len(record[name])} {name}; it is damaged")
    try:
        return from_values(record)
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"the answer record is damaged: {error!r}") from error


def from_values(record: dict[str, Any]) -> Result:
    """The inverse of `to_values`; other values are ignored."""
    values = {field.name: record[field.name] for field in dataclasses.fields(Result)}
    dropped = {
        _path(entry["branch"]): DroppedText(*(entry[name] for name in DroppedText._fields))
        for entry in record["dropped"]
    }
    values["blocks"] = [
        BlockResult(
            block["number"],
            block["parent"],
            [
                BranchResult(**{**branch, "path": _path(branch["path"]), "dropped": dropped.get(_path(branch["path"]))})
                for branch in block["branches"]
            ],
        )
        for block in record["blocks"]
    ]
    values["malformed"] = Counter(record["malformed"])
    values["timeline"] = [TimelineSpan(**span) for span in record["timeline"]]
    values["stops"] = [StopMatch(**stop) for stop in record["stops"]]
    values["ends"] = [EndDraw(**end) for end in record["ends"]]
    for name in ("top_logprobs", "prompt_top_logprobs"):
        values[name] = _tops(record[name])
    return Result(**values)


def _path(steps: list[list[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((block, path) for block, path in steps)


def _tops(tops: list[list[list[float]] | None] | None) -> list[TopLogprobs | None] | None:
    if tops is None:
        return None
    return [None if top is None else [(int(token), logprob) for token, logprob in top] for top in tops]


def _segments(result: Result) -> tuple[list[dict[str, Any]], list[int]]:
    """The segments of an answer in text order, and which one each of its tokens belongs to.

    A segment names its branch, why that ended, the versions of the weights that wrote its first and its last token, and
    its parent: the segment that it follows on its own branch, or the one that forked it; -1 for the first.
    """
    branches: list[BranchResult | None] = [None] * len(result.token_ids)
    for block in result.blocks:  # outer blocks come before inner ones
        for branch in block.branches:
            branches[branch.start : branch.end] = [branch] * (branch.end - branch.start)
    segments: list[dict[str, Any]] = []
    ids: list[int] = []
    for index, owner in enumerate(branches):
        parent = result.parents[index]
        if index == 0 or parent != index - 1 or owner is not branches[index - 1]:
            segments.append(
                {
                    "start": index,
                    "branch": "" if owner is None else owner.name,
                    "path": [] if owner is None else [list(step) for step in owner.path],
                    "parent": ids[parent] if parent >= 0 else -1,
                    "finish": result.finish_reason if owner is None else owner.finish,
                    "weight_versions": [result.weight_versions[index]] * 2,
                }
            )
        ids.append(len(segments) - 1)
        segments[-1]["weight_versions"][1] = result.weight_versions[index]
    return segments, ids


@dataclass(frozen=True)
class TrainingRow:
    """An answer as a training example."""

    sample: Sample
    """Prompt and answer with their layout, as the loader has them (`data.sft_dataset.pack_arrays` takes it)."""
    drawn: npt.NDArray[np.bool_]
    """[N], where the model drew the token; prompt and forced tokens are not trained."""
    logprobs: npt.NDArray[np.float64]
    """[N], log-probability of each drawn token when it was drawn (temperature 1, nothing filtered), 0 elsewhere."""


def training_row(
    result: Result, vocab: StructureVocab, *, max_depth: int | None = None, max_paths: int | None = None
) -> TrainingRow:
    """What a trainer needs of an answer: the same tokens, laid out as the model saw them.

    Args:
        result: the answer.
        vocab: of the tokenizer.
        max_depth: of the engine (`EngineConfig.max_depth`), if it had a limit.
        max_paths: likewise.

    Raises:
        DataError: the structure of these tokens puts them elsewhere than the engine did, as other limits or another
            tokenizer do.
    """
    prompt = len(result.prompt_ids)
    ids = np.array([*result.prompt_ids, *result.token_ids], dtype=np.int64)
    document = parse(ids, vocab, prompt_length=prompt, strict=False, max_depth=max_depth, max_paths=max_paths)
    layout = lay_out(document)
    same = np.array_equal(layout.position_ids[prompt:], result.position_ids)
    if not same or not np.array_equal(layout.r[prompt:], result.labels):
        raise DataError(
            "the layout of the answer's tokens is not the one that the engine recorded; give the tokenizer, "
            "max_depth and max_paths that the engine had"
        )
    drawn = np.array([False] * prompt + result.sampled)
    logprobs = np.array([0.0] * prompt + [0.0 if value is None else value for value in result.logprobs])
    return TrainingRow(Sample(ids, layout), drawn, logprobs)
