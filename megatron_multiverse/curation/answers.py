"""The reading of the answers of each stage. Everything here is a function of its arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_multiverse.curation.chain import Chain
from megatron_multiverse.curation.plan import KINDS, Group, Step, build_steps
from megatron_multiverse.curation.trees import shape, walk, without_announcements
from megatron_multiverse.errors import StructureError
from megatron_multiverse.structure import Block, Tag, parse_text


class Problem(Exception):
    """Why an answer cannot be used, in words that the model is told."""


def read_steps(text: str, chain: Chain) -> tuple[Step, ...]:
    """The answer of stage 1.

    Raises:
        Problem: the steps do not cover the chain.
    """
    value = _json(text)
    try:
        rows = [(_title(row), int(row["first_line"]), row.get("substeps") or []) for row in value["steps"]]
        steps = build_steps([(title, line) for title, line, _ in rows], 1, chain.num_lines)
        return tuple(
            Step(step.number, step.title, step.first, step.last, _substeps(step, inner))
            for step, (_, _, inner) in zip(steps, rows, strict=True)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Problem(_reason(error)) from error


def _substeps(step: Step, rows: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    if not rows:
        return ()
    starts = [(_title(row), int(row["first_line"])) for row in rows]
    return build_steps(starts, step.first, step.last, f"{step.number}.")


def _title(row: Mapping[str, Any]) -> str:
    title = " ".join(str(row["title"]).split())
    if not title:
        raise ValueError("a step has an empty title")
    if any(tag.text in title for tag in Tag):
        raise ValueError(f"the title {title!r} holds a tag")
    return title


def read_groups(text: str, steps: Sequence[Step]) -> tuple[Group, ...]:
    """The answer of stage 2.

    Raises:
        Problem: groups that are no runs of neighbours, or needs that point nowhere or forward.
    """
    levels = [[step.number for step in steps]] + [[sub.number for sub in step.substeps] for step in steps]
    place = {number: (level, k) for level, numbers in enumerate(levels) for k, number in enumerate(numbers)}
    value = _json(text)
    groups: list[Group] = []
    taken: set[str] = set()
    try:
        for row in value["groups"]:
            needs = {str(member["step"]): tuple(map(str, member["needs"])) for member in row["members"]}
            members = tuple(needs)
            _check_group(members, needs, place, taken)
            if row["kind"] not in KINDS:
                raise ValueError(f"kind {row['kind']!r} is none of {', '.join(KINDS)}")
            taken |= set(members)
            groups.append(Group(row["kind"], members, {member: n for member, n in needs.items() if n}))
    except (KeyError, TypeError, ValueError) as error:
        raise Problem(_reason(error)) from error
    return tuple(groups)


def _check_group(
    members: tuple[str, ...],
    needs: Mapping[str, Sequence[str]],
    place: Mapping[str, tuple[int, int]],
    taken: set[str],
) -> None:
    if not members:
        raise ValueError("a group has no members")
    name = f"the group of {', '.join(members)}"
    for member in members:
        if member not in place:
            raise ValueError(f"{name} names {member!r}, which is no step of the outline")
        if member in taken:
            raise ValueError(f"step {member} is in two groups")
    level, first = place[members[0]]
    if [place[member] for member in members] != [(level, first + k) for k in range(len(members))]:
        raise ValueError(f"{name} is no run of neighbouring steps of one level in text order")
    for k, member in enumerate(members):
        if wrong := [needed for needed in needs[member] if needed not in members[:k]]:
            raise ValueError(f"in {name}, {member} needs {', '.join(wrong)}, no earlier member of the group")


def read_blocks(text: str, drafts: Sequence[Block]) -> list[Block | Problem]:
    """The answer of stage 5: for each draft the rewritten block, or why there is none that can be used."""
    found = _cut_blocks(text)
    if len(found) != len(drafts):
        return [Problem(f"the answer has {len(found)} complete outermost blocks instead of {len(drafts)}")] * len(
            drafts
        )
    results: list[Block | Problem] = []
    for piece, draft in zip(found, drafts, strict=True):
        try:
            results.append(_read_block(piece, draft))
        except Problem as problem:
            results.append(problem)
        except StructureError as error:
            near = " ".join(piece[max(0, (error.char_index or 0) - 60) : (error.char_index or 0)].split())
            results.append(Problem(f'after "{near}": found {error.found}, expected {error.expected}'))
    return results


def _cut_blocks(text: str) -> list[str]:
    """The outermost blocks of an answer, as texts."""
    pieces, depth, start = [], 0, 0
    for match in re.finditer(r"</?Parallel>", text):
        if match.group() == Tag.PARALLEL.text:
            start = match.start() if depth == 0 else start
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                pieces.append(text[start : match.end()])
    return pieces


def _read_block(piece: str, draft: Block) -> Block:
    """One block, read strictly.

    Raises:
        StructureError: it breaks the grammar.
        Problem: it has another form than the draft, or an empty part.
    """
    (block,) = without_announcements(parse_text(piece))
    assert isinstance(block, Block)
    if shape(block) != shape(draft):
        raise Problem(f"it must have {_describe(draft)}, but has {_describe(block)}")
    for _, inner in walk((block,)):
        if not all(outline.strip() for outline in inner.outlines):
            raise Problem("an outline is empty")
        if not inner.conclusion.strip():
            raise Problem("a conclusion is empty")
        if not all(any(not isinstance(part, str) or part.strip() for part in path) for path in inner.paths):
            raise Problem("a path is empty")
    return block


def _describe(block: Block) -> str:
    inner = [sum(isinstance(part, Block) for part in path) for path in block.paths]
    return f"{len(inner)} paths with {', '.join(map(str, inner))} inner blocks"


def read_verdicts(text: str, count: int) -> dict[int, list[str]]:
    """The answer of the judge: index of a block -> why paths of it are not independent.

    Raises:
        Problem: it speaks of blocks that were not asked about.
    """
    value = _json(text)
    reasons: dict[int, list[str]] = {}
    try:
        for row in value["verdicts"]:
            index = int(row["block"]) - 1
            if not 0 <= index < count:
                raise ValueError(f"block {row['block']} is none of 1 to {count}")
            if not row["is_independent"]:
                reasons.setdefault(index, []).append(f"path {row['path']}: {row['reason']}")
    except (KeyError, TypeError, ValueError) as error:
        raise Problem(_reason(error)) from error
    return reasons


def _json(text: str) -> dict[str, Any]:
    # Some servers of open models put a fence around JSON.
    fenced = re.fullmatch(r"\s*```(?:json)?\n(.*?)\n```\s*", text, flags=re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except ValueError as error:
        raise Problem(f"the answer is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Problem("the answer is not a JSON object")
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the field {error} is missing"
    return str(error)
