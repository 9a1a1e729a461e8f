"""A branch: one running sequence of a request, with its text, its grammar and its place in the cache.

What a token does to it is in `commit.py`, how it splits and comes together in `fork_join.py`, what it may still write
in `budget.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from megatron_multiverse.inference.budget import Budget
from megatron_multiverse.inference.result import BlockResult, BranchFinish, BranchResult, TimelineSpan
from megatron_multiverse.inference.sampler import branch_key
from megatron_multiverse.inference.tree import Node
from megatron_multiverse.structure import Event, StructureMachine

if TYPE_CHECKING:
    from megatron_multiverse.inference.request_state import RequestState


class Status(Enum):
    """Where a branch stands."""

    WAITING = auto()
    """Created by a fork, not started."""
    RUNNING = auto()
    """Feeds its pending ids and samples."""
    FORKED = auto()
    """Wrote `</Goal>`; its paths wait or run."""
    CLOSING = auto()
    """Wrote its last token, which still has to be fed."""
    ENDED = auto()
    """All its keys are in the cache (or no longer needed)."""


@dataclass
class Block:
    """A fork of a branch."""

    number: int
    """Number in the request, from 1."""
    at: int
    """Tokens of the forking branch before the paths."""
    kids: list[Branch]
    started: int = 0
    joined: bool = False


@dataclass(eq=False)
class Branch:
    """See the module."""

    request: RequestState
    machine: StructureMachine
    next_position: int
    """Position of the next token to be written."""
    budget: Budget
    parent: Branch | None = None
    path: tuple[tuple[int, int], ...] = ()
    """(block in its parent, path in the block) from the root down; the key of its noise."""
    name: str = ""
    """"" for the root, "2.1" for the first path of a block in the second path."""
    outline: str = ""
    block: int = 0
    """Number of the block it belongs to; 0 for the root."""
    status: Status = Status.WAITING
    node: Node | None = None
    ids: list[int] = field(default_factory=list)
    """Own tokens, without those of its blocks' paths."""
    positions: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    """Tokens written but not fed to the model."""
    blocks: list[Block] = field(default_factory=list)
    num_sampled: int = 0
    """Tokens sampled so far: the index of the next one's noise."""
    total: int = 0
    """Tokens of the branch and of all its joined blocks."""
    finish: BranchFinish | None = None
    key: int = field(init=False)
    _span_start: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        params = self.request.params
        self.key = branch_key(params.seed, params.sample, self.path)

    # -- writing -----------------------------------------------------------------------------------------------

    def write(self, ids: Sequence[int]) -> Event:
        """Append tokens to the text; they are pending until fed. Returns the last token's event."""
        event = Event.TEXT
        for token in ids:
            event = self.machine.push(token)
        start = self.next_position
        self.next_position += len(ids)
        self.positions += range(start, self.next_position)
        self.ids += ids
        self.pending += ids
        self.total += len(ids)
        self.request.announce(self, ids)
        return event

    def close(self, finish: BranchFinish) -> None:
        """Write what closes everything open and end the branch."""
        closing = self.machine.closing_ids()
        if closing:
            self.request.counts["forced_close"] += 1
            self.write(closing)
        self.end(finish)

    def end(self, finish: BranchFinish) -> None:
        """The text is complete; feed what is pending, then join."""
        self.finish = finish
        self.status = Status.CLOSING
        self.end_span()

    @property
    def open_block(self) -> Block | None:
        """The block whose paths wait or run."""
        return self.blocks[-1] if self.blocks and not self.blocks[-1].joined else None

    # -- reading -----------------------------------------------------------------------------------------------

    def start_span(self) -> None:
        """The branch begins to run (again)."""
        self._span_start = (self.request.step, len(self.ids))

    def end_span(self) -> None:
        """The branch stops running."""
        if self._span_start is None:
            return
        step, tokens = self._span_start
        self._span_start = None
        self.request.timeline.append(
            TimelineSpan(self.name, self.block, step, self.request.step + 1, len(self.ids) - tokens)
        )

    def linearise(self, ids: list[int], positions: list[int], blocks: list[BlockResult]) -> None:
        """Append the text of the branch and of its blocks, in text order."""
        done = 0
        for block in self.blocks:
            ids += self.ids[done : block.at]
            positions += self.positions[done : block.at]
            done = block.at
            record = BlockResult(block.number, self.name)
            blocks.append(record)
            for kid in block.kids:
                start = len(ids)
                kid.linearise(ids, positions, blocks)
                record.branches.append(BranchResult(kid.name, kid.outline, start, len(ids), kid.finish or "abort"))
        ids += self.ids[done:]
        positions += self.positions[done:]

    def count_malformed(self, counts: Counter[str]) -> None:
        """Add up what the machines of the branch and of its paths counted."""
        counts.update(self.machine.malformed)
        for block in self.blocks:
            for kid in block.kids:
                kid.count_malformed(counts)
