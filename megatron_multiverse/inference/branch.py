"""A branch: one running sequence of a request, with its text, its grammar and its budget.

Budgets are split when a block forks, so what a branch may write never depends on how fast its siblings run:
`token_cap` bounds the tokens of the branch and everything it forks, `position_cap` the position behind its last
token (the longest chain). What closes the structure is reserved from the start; see `fits`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from megatron_multiverse.inference.result import BlockResult, BranchFinish, BranchResult, TimelineSpan
from megatron_multiverse.inference.sampler import branch_key
from megatron_multiverse.inference.tree import Node
from megatron_multiverse.structure import Event, StructureMachine, Tag

if TYPE_CHECKING:
    from megatron_multiverse.inference.request import RequestState

MAX_GROWTH = 3
"""A tag can add at most this many ids to what must be closed: a newline, its closer, the newline before the next."""

MOST_CLOSERS = 32
"""No branch ever has that much to close (its machine holds one block at most), so no exact count is needed."""


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
    token_cap: int
    position_cap: int
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

    def room(self) -> int:
        """Tokens that still fit, what closes the branch included."""
        return min(self.token_cap - self.total, self.position_cap - self.next_position)

    def fits(self, token: int) -> bool:
        """Whether `token` and whatever then closes the branch stay within the budget."""
        room = self.room()
        if room > MOST_CLOSERS:
            return True
        closing = self.machine.closing_ids()
        vocab = self.machine.vocab
        tag = vocab.tag_of.get(token)
        if tag in (Tag.PARALLEL, Tag.GOAL, Tag.OUTLINE, Tag.THINK, Tag.END_GOAL):
            growth = MAX_GROWTH
        elif closing and closing[0] == token:
            growth = -1
        else:
            # Behind a newline the first closer needs none; behind anything else it does.
            growth = int(bool(closing) and closing[0] != vocab.newline_id and token != vocab.newline_id)
        return 1 + len(closing) + growth <= room

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

    def exhausted(self) -> bool:
        """Whether nothing fits any more but what closes the branch."""
        room = self.room()
        return room <= MOST_CLOSERS and room <= len(self.machine.closing_ids())

    # -- blocks ------------------------------------------------------------------------------------------------

    @property
    def open_block(self) -> Block | None:
        """The block whose paths wait or run."""
        return self.blocks[-1] if self.blocks and not self.blocks[-1].joined else None

    def fork(self) -> bool:
        """Create the branches of the block just announced, or refuse because their forced tokens do not fit."""
        vocab = self.machine.vocab
        outlines = self.machine.outlines
        prefixes = [vocab.path_prefix(outline.label_ids) for outline in outlines]
        # Each path needs at least its prefix and a newline with </Path>.
        needs = [len(prefix) + 2 for prefix in prefixes]
        tail = len(self.machine.closing_ids())
        spare = self.token_cap - self.total - tail - sum(needs)
        position_cap = self.position_cap - tail
        if spare < 0 or self.next_position + max(needs) > position_cap:
            return False
        # Equal shares; what a path leaves over comes back at the join, for the text behind the block.
        share = spare // len(outlines)
        ordinal = len(self.blocks)
        self.request.num_blocks += 1
        block = Block(self.request.num_blocks, len(self.ids), [])
        for k, outline in enumerate(outlines):
            kid = Branch(
                request=self.request,
                machine=self.machine.fork(k),
                next_position=self.next_position,
                token_cap=needs[k] + share,
                position_cap=position_cap,
                parent=self,
                path=(*self.path, (ordinal, k)),
                name=f"{self.name}.{k + 1}" if self.name else str(k + 1),
                outline=outline.label,
                block=block.number,
            )
            block.kids.append(kid)
        self.blocks.append(block)
        for kid, prefix in zip(block.kids, prefixes, strict=True):
            kid.write(prefix)
        self.status = Status.FORKED
        self.end_span()
        return True

    def join(self) -> None:
        """All paths of the open block ended: count them in; the conclusion comes next."""
        block = self.open_block
        assert block is not None
        block.joined = True
        self.total += sum(kid.total for kid in block.kids)
        self.next_position = max(kid.next_position for kid in block.kids)
        self.machine.join()

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
