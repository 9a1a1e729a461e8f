"""From the outline of a chain and its groups of independent steps to a tree of blocks over the lines of the chain.

A block runs its paths at the same time and goes on when all are done, so a tree of blocks can hold series-parallel
orders only. Where a step waits for some of its neighbours only, `arrange` finds the nearest order that a tree can hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megatron_multiverse.curation.chain import Chain
from megatron_multiverse.curation.trees import dissolve
from megatron_multiverse.structure import Block, Parts

KINDS: dict[str, str] = {
    "case_study": "collective",
    "subtask": "collective",
    "other_collective": "collective",
    "path_exploration": "selective",
    "other_selective": "selective",
}
"""Kinds of blocks as the paper's Table 1 has them. All paths of a collective block are needed (AND); a selective block
tries several ways, of which one is enough (OR)."""


@dataclass(frozen=True)
class Step:
    """One step of the outline: lines [first, last] of the chain, both included."""

    number: str
    """ "2", or "2.1" for a step within a step."""
    title: str
    first: int
    last: int
    substeps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Group:
    """Neighbouring steps, at least some of which can be done at the same time."""

    kind: str
    members: tuple[str, ...]
    """Numbers of the steps, in text order."""
    needs: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Step -> earlier members whose results it uses."""


@dataclass(frozen=True)
class PlanBlock:
    """A block over lines of the chain; a path is a run of steps."""

    kind: str
    steps: tuple[tuple[Step, ...], ...]
    """The steps of each path."""
    paths: tuple[tuple[PlanPart, ...], ...]

    @property
    def lines(self) -> tuple[int, int]:
        """First and last line, both included."""
        return self.steps[0][0].first, self.steps[-1][-1].last


PlanPart = tuple[int, int] | PlanBlock
"""Lines of plain text (first and last, both included), or a block."""


def arrange(group: Group) -> tuple[list[list[list[str]]], str]:
    """Order the members of a group so that a tree of blocks can hold it.

    Returns:
        A list of blocks to be done one after the other. A block is a list of paths, a path a list of members; a block
        of a single path is plain text.
        How it was done: "parallel" (no member needs another), "chained" (members that need one another follow each
        other in one path), "split" (no tree of one block holds the order, so it was cut into several), "sequential"
        (nothing is left to be done at the same time).
    """
    if not any(group.needs.get(member) for member in group.members):
        return [[[member] for member in group.members]], "parallel"
    paths = _components(group)
    if len(paths) > 1 and [member for path in paths for member in path] == list(group.members):
        return [paths], "chained"
    blocks = _layers(group)
    if all(len(block) == 1 for block in blocks):
        return blocks, "sequential"
    return blocks, "split"


def _components(group: Group) -> list[list[str]]:
    """Members that are connected by needs, in text order."""
    root = {member: member for member in group.members}

    def find(member: str) -> str:
        while root[member] != member:
            member = root[member]
        return member

    for member, needed in group.needs.items():
        for other in needed:
            root[find(member)] = find(other)
    found: dict[str, list[str]] = {}
    for member in group.members:
        found.setdefault(find(member), []).append(member)
    return list(found.values())


def _layers(group: Group) -> list[list[list[str]]]:
    """Cut the members, in text order, before each one that needs another since the last cut."""
    blocks: list[list[list[str]]] = [[]]
    for member in group.members:
        if any([needed] in blocks[-1] for needed in group.needs.get(member, ())):
            blocks.append([])
        blocks[-1].append([member])
    return blocks


@dataclass(frozen=True)
class Plan:
    """Text and blocks of a whole chain, and how often groups were ordered in which way."""

    parts: tuple[PlanPart, ...]
    arranged: Counter[str]


def build_plan(steps: Sequence[Step], groups: Sequence[Group]) -> Plan:
    """Put blocks in the place of grouped steps; the other steps are plain text."""
    arranged: Counter[str] = Counter()
    starts: dict[str, tuple[Group, list[list[list[str]]]]] = {}
    for group in groups:
        blocks, how = arrange(group)
        arranged[how] += 1
        starts[group.members[0]] = group, blocks
    return Plan(_plan_level(steps, starts), arranged)


def _plan_level(
    steps: Sequence[Step], starts: Mapping[str, tuple[Group, list[list[list[str]]]]]
) -> tuple[PlanPart, ...]:
    by_number = {step.number: step for step in steps}
    parts: list[PlanPart] = []
    covered: set[str] = set()
    for step in steps:
        if step.number in covered:
            continue
        if step.number not in starts:
            parts += _step_parts(step, starts)
            continue
        group, blocks = starts[step.number]
        covered |= set(group.members)
        for block in blocks:
            paths = [tuple(by_number[member] for member in path) for path in block]
            written = tuple(_merge_lines(part for s in path for part in _step_parts(s, starts)) for path in paths)
            # A group whose members all follow one another is text. A group of one member was asked for: it is a block.
            if len(paths) == 1 and len(group.members) > 1:
                parts += written[0]
            else:
                parts.append(PlanBlock(group.kind, tuple(paths), written))
    return _merge_lines(parts)


def _step_parts(step: Step, starts: Mapping[str, tuple[Group, list[list[list[str]]]]]) -> tuple[PlanPart, ...]:
    return _plan_level(step.substeps, starts) if step.substeps else ((step.first, step.last),)


def _merge_lines(parts: Iterator[PlanPart] | Sequence[PlanPart]) -> tuple[PlanPart, ...]:
    merged: list[PlanPart] = []
    for part in parts:
        before = merged[-1] if merged else None
        if isinstance(part, tuple) and isinstance(before, tuple):
            merged[-1] = (before[0], part[1])
        else:
            merged.append(part)
    return tuple(merged)


def plan_blocks(parts: Sequence[PlanPart]) -> Iterator[PlanBlock]:
    """Every block, outer before inner, in text order."""
    for part in parts:
        if isinstance(part, PlanBlock):
            yield part
            for path in part.paths:
                yield from plan_blocks(path)


def flatten_plan(parts: Sequence[PlanPart], gone: Collection[int]) -> tuple[PlanPart, ...]:
    """Turn some blocks into the lines of their paths, as `trees.flatten` does with text.

    Args:
        parts: a plan.
        gone: indices of blocks in the order of `plan_blocks`.
    """
    chosen = {id(block) for k, block in enumerate(plan_blocks(parts)) if k in gone}
    flat: tuple[PlanPart, ...] = dissolve(parts, chosen, _merge_lines)
    return flat


def drop_outermost(parts: Sequence[PlanPart], gone: Collection[int]) -> tuple[PlanPart, ...]:
    """Turn some outermost blocks, with all blocks in them, into lines; they count from 0."""
    found: list[PlanPart] = []
    number = 0
    for part in parts:
        if isinstance(part, PlanBlock):
            found.append(part.lines if number in gone else part)
            number += 1
        else:
            found.append(part)
    return _merge_lines(found)


def refill(parts: Sequence[PlanPart], chain: Chain) -> Parts:
    """The original text in the structure of the plan; outlines are the titles of steps, conclusions are empty."""
    return tuple(_refill_block(part, chain) if isinstance(part, PlanBlock) else chain.slice(*part) for part in parts)


def _refill_block(block: PlanBlock, chain: Chain) -> Block:
    outlines = tuple("; ".join(step.title for step in path) for path in block.steps)
    return Block(outlines, tuple(refill(path, chain) for path in block.paths), "")


def build_steps(starts: Sequence[tuple[str, int]], first: int, last: int, prefix: str = "") -> tuple[Step, ...]:
    """Steps that cover the lines [first, last], each up to where the next one begins.

    Args:
        starts: title and first line of each step.
        first: first line of what they cover.
        last: last line of what they cover.
        prefix: what their numbers start with, ``"2."`` within step 2.

    Raises:
        ValueError: they do not begin with `first`, do not increase, or go beyond `last`.
    """
    lines = [line for _, line in starts]
    if lines[:1] != [first]:
        raise ValueError(f"step {prefix}1 must begin with line {first}, not with {lines[0] if lines else 'nothing'}")
    for k, (before, line) in enumerate(pairwise(lines), 2):
        if not before < line <= last:
            raise ValueError(f"step {prefix}{k} begins with line {line}; it must be one of {before + 1} to {last}")
    ends = [line - 1 for line in lines[1:]] + [last]
    return tuple(
        Step(f"{prefix}{k}", title, line, end)
        for k, ((title, line), end) in enumerate(zip(starts, ends, strict=True), 1)
    )
