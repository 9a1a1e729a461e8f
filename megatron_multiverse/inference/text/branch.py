"""A branch: one running sequence of a request, as text. `commit.py` writes it, `scheduler.py` feeds it.

The life of a branch::

    waiting ───► running ──── </Goal> ────► forked
                  │   ▲                        │
                  │   └── all paths ended ─────┘
                  │       (the join: the conclusion begins)
                  ▼
                ended ──── its last token is fed ────► fed

waiting: just forked, the scheduler has not given it a place in the cache yet. running: takes the next token.
forked: its paths are written, it waits for them (`open_block`). ended: `</Path>`, the end of the text, or a spent
budget (`finish`). fed: the keys of all its tokens are in the cache, so they can be joined into the parent's.

Text and cache fork and join at different times: the text when a token is committed, the cache when that token is fed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_multiverse.inference.text.counts import TokenCounts
from megatron_multiverse.inference.text.guide import Guide
from megatron_multiverse.inference.text.result import BranchFinish, StopMatch, TopLogprobs
from megatron_multiverse.inference.text.scanner import StopScanner
from megatron_multiverse.structure import StructureMachine

BranchPath = tuple[tuple[int, int], ...]
"""(block in its parent, path in that block), both from 0, from the root down: what a branch is known by."""


class Budget(NamedTuple):
    """The limits of a branch."""

    tokens: int
    """Tokens of the branch and of everything it forks."""
    position: int
    """All its positions lie below this one: the limit of the longest chain."""
    own: int | None = None
    """Tokens of the branch alone, its forced beginning included; None is no limit."""


@dataclass
class Block:
    """A fork of a branch."""

    number: int
    """Number in the request, from 1."""
    at: int
    """Tokens in the forking branch's `ids` before the paths: once so many are fed, the cache forks, and later joins."""
    kids: list[Branch]
    joined: bool = False
    """Whether all paths have ended and the conclusion has begun."""
    successes: list[int] = field(default_factory=list)
    """Where paths ended that succeeded, in order, if the paths are tries."""
    commit_at: int | None = None
    """The position at which enough had."""
    started: int = 0
    """Paths that were given a place in the cache, in their order."""


class PathStart(NamedTuple):
    """What a path begins with."""

    path: BranchPath
    machine: StructureMachine
    """Its grammar, after `prefix`."""
    prefix: list[int]
    """The forced tokens."""
    key: int
    """See `Branch.key`."""


@dataclass(eq=False, slots=True)
class Branch:
    """One sequence: the root of a request, or a path of a block."""

    machine: StructureMachine
    """The grammar, as far as the branch has been written."""
    next_position: int
    """Position of the next token."""
    budget: Budget
    """Its limits; `room` is what is left of them."""
    key: int
    """Key of its sampling noise, see `branch_key`."""
    parent: Branch | None = None
    path: BranchPath = ()
    name: str = ""
    """"" for the root, "2.1" for the first path of a block inside a second path."""
    outline: str = ""
    """Label of a path as its outline writes it."""
    block: int = 0
    """Number of the block it belongs to; 0 for the root."""
    prompt_blocks: int = 0
    """Blocks of earlier answers in the prompt, which come first in `blocks`; only the root has them."""
    prompt_length: int = 0
    """Tokens of the prompt at the beginning of `ids`; only the root has them."""
    ids: list[int] = field(default_factory=list)
    """Its own tokens: those of the paths of its blocks are theirs."""
    positions: list[int] = field(default_factory=list)
    """Position of each of them."""
    logprobs: list[float | None] = field(default_factory=list)
    """Log-probability of each sampled one; None for the prompt and for forced tokens."""
    top_logprobs: list[TopLogprobs | None] | None = None
    """Beside each of its tokens the most likely ones, None for the prompt and for forced tokens; None where the request
    does not ask for them."""
    versions: list[tuple[int, int]] = field(default_factory=list)
    """(index in `ids`, version of the weights from there on), in order."""
    end_ids: frozenset[int] = frozenset()
    """Ids that end it when they are drawn, instead of becoming part of it."""
    scanner: StopScanner | None = None
    """Looks for stop texts in what the branch writes, where the request has some that count here."""
    stop: StopMatch | None = None
    """The stop text that ended it."""
    stop_reason: str | int | None = None
    """The stop text or stop token that ended it."""
    end_draw: tuple[int, int, float] | None = None
    """(length of `ids` before it, token, log-probability) of a token that ended it without becoming text."""
    leaves_open: bool = False
    """Whether nothing is closed at its end (`SamplingParams.leave_open`)."""
    is_bare: bool = False
    """Whether nothing is kept of its tokens but what every branch keeps, and nothing is looked for in them."""
    seen: TokenCounts | None = None
    """Tokens that the next one sees, kept where the request has penalties."""
    guide: Guide | None = None
    """Which tokens may come next, where the request has a grammar; paths are free."""
    foreseen: tuple[int, list[PathStart]] | None = None
    """(length of `ids`, what the paths of its next block begin with if the token after that length is `</Goal>`)."""
    fed: int = 0
    """How many of its tokens have their keys in the cache, those of the step being planned included."""
    blocks: list[Block] = field(default_factory=list)
    num_joined: int = 0
    """How many of its blocks are joined in the cache."""
    num_sampled: int = 0
    """Tokens sampled so far: the index of the next one's noise."""
    total: int = 0
    """Tokens written by the branch and by all its joined blocks."""
    dropped_tokens: int = 0
    """Tokens of tries that were dropped in its joined blocks; they are no part of the text, but of the budget."""
    tried: Branch | None = None
    """What it was before it was dropped."""
    room: int = 0
    """Tokens that still fit into its budget, what closes it included; `commit.py` counts it down."""
    finish: BranchFinish | None = None
    """Why it ended; None while it goes on."""
    forced_close: bool = False
    """Whether what was open at its end was closed by the engine."""
    fork_refused: bool = False
    """Whether it ended at a block whose paths did not fit into its budget."""
    span_start: tuple[int, int] | None = None
    """(step of the request, length of `ids`) when it began to take tokens without interruption; None while it takes
    none."""

    def closing_ids(self) -> list[int]:
        """What closes everything that is open in it."""
        return [] if self.leaves_open else self.machine.closing_ids()

    def count_room(self) -> None:
        """Count `room` afresh: a join changes it otherwise than token by token."""
        tokens, position, own = self.budget
        self.room = min(tokens - self.total - self.dropped_tokens, position - self.next_position)
        if own is not None:
            self.room = min(self.room, own - len(self.ids))

    @property
    def open_block(self) -> Block | None:
        """The block whose paths are being written."""
        return self.blocks[-1] if self.blocks and not self.blocks[-1].joined else None

    @property
    def cache_block(self) -> Block | None:
        """The next block that has to fork or join in the cache."""
        return self.blocks[self.num_joined] if self.num_joined < len(self.blocks) else None

    @property
    def block_to_join(self) -> Block | None:
        """The next block to join in the cache, if all its paths have ended and are fed to the end."""
        block = self.cache_block
        return block if block is not None and all(kid.is_fed for kid in block.kids) else None

    @property
    def feed_end(self) -> int:
        """How many of its tokens may be fed before a block forks, or joins, in the cache."""
        block = self.cache_block
        return len(self.ids) if block is None else block.at

    @property
    def is_fed(self) -> bool:
        """Whether it has ended and all its keys are in the cache."""
        return self.finish is not None and self.fed == len(self.ids)

    @property
    def wants_row(self) -> bool:
        """Whether it takes part in steps, once it has a place in the cache: not while it waits for its paths, not when
        it has ended and is fed."""
        return self.fed < self.feed_end or (self.finish is None and self.num_joined == len(self.blocks))

    @property
    def in_prompt(self) -> bool:
        """Whether it is a root that is still fed its prompt, up to the first fork in it."""
        return self.fed < self.prompt_length and self.num_joined == 0 and self.fed < self.feed_end

    def goes_on_after(self, length: int) -> bool:
        """Whether it has written `length` tokens and goes on with one that is drawn."""
        return len(self.ids) == length and self.finish is None and (not self.blocks or self.blocks[-1].joined)


class Cut(NamedTuple):
    """A path whose text was cut; what the cache has of it goes."""

    branch: Branch
    kept: int
    """Tokens at its beginning that are as they were."""
    inner: list[Branch]
    """Branches that it had forked."""


def branch_key(seed: int, sample: int, path: Sequence[tuple[int, int]]) -> int:
    """Key of a branch's noise, signed 64 bit: a hash of the seed, the number of the answer and the branch's path."""
    digest = hashlib.blake2b(repr((seed, sample, tuple(path))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
