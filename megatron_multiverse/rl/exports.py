"""Answers as rows for other trainers: one row with labels for ours, or rows that any causal trainer can take.

A stock trainer masks causally and counts positions from 0. That is right for a *prefix and one path*: the prompt, the
text up to a fork, and what one path wrote. It is wrong for whatever comes after a join, which sees all paths and stands
after the longest of them; such text is not exported as rows, and said to be left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.files import is_same_file, write_text_atomic
from megatron_multiverse.inference import Result, from_record, to_record

AFTER_A_JOIN = (
    "it comes after a join: it sees every path and stands after the longest, but a causal trainer would count its "
    "positions on from the last path; train it from a linear row, with its labels"
)


@dataclass(frozen=True)
class ExpandedRow:
    """A prefix and what one branch wrote after it; plain causal attention and positions from 0 are right for it."""

    branch: str
    """Name of the branch that wrote the response; "" is the root."""
    prompt_ids: list[int]
    """The prompt and everything that the branch saw when it began."""
    response_ids: list[int]
    """What it wrote until it forked or ended; with the end token, where the model drew one."""
    response_mask: list[int]
    """1 where the model drew the token. Over all rows of an answer every token counts once."""
    response_logprobs: list[float]
    """Log-probability of each drawn token, 0 elsewhere."""
    weight_versions: list[int]
    """Version of the weights that wrote each token."""


@dataclass(frozen=True)
class LeftOut:
    """A stretch of an answer that no such row can hold."""

    branch: str
    start: int
    """First token in the answer."""
    drawn: int
    """How many of its tokens the model drew."""
    reason: str


def linear_row(result: Result) -> dict[str, Any]:
    """An answer as one row for a trainer that takes positions and visibility labels, as ours does.

    Returns:
        ``input_ids``, ``position_ids``, ``r`` (token i sees an earlier j iff r[j] <= r[i]); ``loss_mask``, 1 where the
        model drew the token; ``logprobs`` of the drawn tokens, 0 elsewhere; ``ends``, what it drew to end branches:
        [index of the token before, token, log-probability].

    Raises:
        DataError: the prompt has blocks of earlier answers, whose layout an answer does not tell.
    """
    prompt = len(result.prompt_ids)
    if result.labels and result.position_ids[0] != prompt:
        raise DataError(
            "the prompt of this answer has blocks of earlier answers, whose positions it does not tell; lay the prompt "
            "out with structure.parse and structure.lay_out"
        )
    before = list(range(prompt))
    return {
        "input_ids": [*result.prompt_ids, *result.token_ids],
        "position_ids": before + result.position_ids,
        "r": before + result.labels,
        "loss_mask": [0] * prompt + [int(drawn) for drawn in result.sampled],
        "logprobs": [0.0] * prompt + [logprob or 0.0 for logprob in result.logprobs],
        "ends": [[prompt + end.parent, end.token, end.logprob] for end in result.ends],
    }


def expanded_rows(result: Result) -> tuple[list[ExpandedRow], list[LeftOut]]:
    """An answer as rows for stock trainers, and what they cannot take.

    Give all rows of an answer its one advantage, and divide the loss by the drawn tokens of the whole batch, not row by
    row. Nothing is tokenised again: rows hold the ids that were drawn.
    """
    record = to_record(result)
    segments: list[Mapping[str, Any]] = record["segments"]
    borders = [*(segment["start"] for segment in segments), len(result.token_ids)]
    rows: list[ExpandedRow] = []
    left_out: list[LeftOut] = []
    prefixes: dict[int, list[int] | None] = {-1: list(result.prompt_ids)}  # after each segment; None: none is causal
    for number, segment in enumerate(segments):
        start, end = borders[number], borders[number + 1]
        parent = segment["parent"]
        joins = parent >= 0 and segments[parent]["path"] == segment["path"]  # it goes on after its own fork
        prefix = None if joins else prefixes[parent]
        if prefix is None:
            prefixes[number] = None
            left_out.append(LeftOut(segment["branch"], start, sum(result.sampled[start:end]), AFTER_A_JOIN))
            continue
        prefixes[number] = prefix + result.token_ids[start:end]
        rows.append(_row(result, segment["branch"], prefix, start, end))
    if not segments and result.ends:  # the model ended the answer at once
        rows.append(_row(result, "", list(result.prompt_ids), 0, 0))
    return rows, left_out


def _row(result: Result, branch: str, prefix: list[int], start: int, end: int) -> ExpandedRow:
    """A segment; where the model drew an end token after its last drawn one, it takes the place of what closes it."""
    logprobs, ids, versions = result.logprobs[start:end], result.token_ids[start:end], result.weight_versions[start:end]
    for drawn in result.ends:
        if start <= drawn.parent < end or (start == end and drawn.parent == start - 1):
            kept = drawn.parent + 1 - start
            version = versions[kept - 1] if kept else 0
            ids, logprobs = [*ids[:kept], drawn.token], [*logprobs[:kept], drawn.logprob]
            versions = [*versions[:kept], version]
    mask = [int(logprob is not None) for logprob in logprobs]
    return ExpandedRow(branch, prefix, ids, mask, [logprob or 0.0 for logprob in logprobs], versions)


class Totals(NamedTuple):
    """What an export came to."""

    answers: int
    rows: int
    drawn: int
    """Tokens that the model drew."""
    left_out: int
    """Those of them that are in no row."""
    reason: str
    """Why."""


def export_records(source: Path, target: Path, kind: Literal["linear", "expanded"]) -> Totals:
    """Write the answers of a file of records as rows, whole or not at all.

    Each row says which line of the file its answer is (`record`), and has the answer's `reward` and `advantage` where
    the record has them. All rows of an answer share its advantage.

    Raises:
        ConfigError: there is no such file, or it is the one to write.
        DataError: a line is no record, and the message names it; or there is none.
    """
    if is_same_file(source, target):
        raise ConfigError(f"--output {target} is the input, whose records nothing else holds; give it another name")
    lines: list[str] = []
    answers = drawn = left_out = 0
    for number, record, result in _records(source):
        about: dict[str, Any] = {"record": number}
        about |= {name: record[name] for name in ("reward", "advantage") if name in record}
        answers, drawn = answers + 1, drawn + sum(result.sampled)
        if kind == "linear":
            lines.append(json.dumps({**about, **linear_row(result)}))
        else:
            rows, missing = expanded_rows(result)
            lines += [json.dumps({**about, **dataclasses.asdict(row)}) for row in rows]
            left_out += sum(part.drawn for part in missing)
    if not answers:
        raise DataError(f"{source} is empty: there is no answer to write")
    write_text_atomic(target, "".join(line + "\n" for line in lines))
    return Totals(answers, len(lines), drawn, left_out, AFTER_A_JOIN)


def _records(source: Path) -> Iterator[tuple[int, dict[str, Any], Result]]:
    """The records of a file with their line numbers, from 1, and the answers that they are."""
    if not source.is_file():
        what = "a folder" if source.is_dir() else "no such file"
        raise ConfigError(f"{source}: {what}; name rollouts.jsonl of a run, or a file of tools/generate.py --records")
    with open(source, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                result = from_record(record)
            except DataError as error:  # which is a ValueError, too
                raise DataError(f"{source}, line {number}: {error}") from error
            except ValueError as error:
                raise DataError(f"{source}, line {number}: no JSON ({error}); it may be cut off") from error
            yield number, record, result
