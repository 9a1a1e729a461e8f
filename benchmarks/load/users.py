"""Who sends what: users who ask about a document, read the answer for a while, and ask again.

A trace says how many users there are when, and how many of them ask what the model answers in parallel. The tokens are
scripts, since no model runs: plain text, or a block whose paths are the same length up to chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.bench_host_step import PIECES
from megatron_multiverse.inference.text.branch import BranchPath, branch_key
from megatron_multiverse.structure import TAGS, Tag

TEXT, NEWLINE, EOS = len(PIECES) + 1, PIECES.index("\n"), len(PIECES)
"""Ids of plain text, of a newline and of the end."""
assert len(TAGS) <= NEWLINE


@dataclass(frozen=True)
class Phase:
    """A stretch of a trace."""

    seconds: float
    users: int


@dataclass(frozen=True)
class Trace:
    """What comes in."""

    name: str
    forking: float
    """Share of the users whose answers fork."""
    phases: tuple[Phase, ...] = (Phase(5, 8), Phase(5, 32), Phase(20, 192), Phase(5, 32), Phase(5, 8))
    document: int = 6144
    """Tokens of what a user asks about, which the cache has from an earlier question."""
    new_document: float = 0.1
    """Share of the questions that are about another document, which it does not have."""
    question: int = 256
    """Tokens of a question."""
    paths: int = 8
    path_tokens: int = 400
    """Tokens of a path."""
    serial_tokens: int = 800
    """Tokens of an answer that does not fork."""
    think: float = 1.0
    """Mean seconds between an answer and the next question."""

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def most_users(self) -> int:
        """How many users there are at the height of it."""
        return max(phase.users for phase in self.phases)

    def users_at(self, now: float) -> int:
        """How many users there are."""
        for phase in self.phases:
            now -= phase.seconds
            if now < 0:
                return phase.users
        return 0


TRACES = (Trace("serial users only", 0.0), Trace("mixed", 0.5), Trace("all fork by 8", 1.0))


def make_text(mean: int, rng: np.random.Generator) -> list[int]:
    """Text of about that many tokens, unlike any other."""
    ids: list[int] = rng.integers(TEXT, TEXT + 64, size=int(mean * rng.uniform(0.75, 1.25))).tolist()
    return ids


def script(trace: Trace, *, forks: bool, number: int, rng: np.random.Generator) -> dict[int, list[int]]:
    """What each branch of an answer draws, by the key of the branch."""

    def text(mean: int) -> list[int]:
        return [TEXT] * int(mean * rng.uniform(0.75, 1.25))

    branches: dict[BranchPath, list[int]] = {}
    if not forks:
        branches[()] = [*text(trace.serial_tokens), EOS]
    else:
        header: list[int] = [Tag.PARALLEL, NEWLINE, Tag.GOAL]
        for k in range(trace.paths):
            label = [PIECES.index(char) for char in f"{k + 1}:"]
            header += [NEWLINE, Tag.OUTLINE, NEWLINE, *label, TEXT, TEXT, Tag.END_OUTLINE]
            branches[((0, k),)] = [*text(trace.path_tokens), Tag.END_PATH]
        end = [*text(20), Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL, *text(20), EOS]
        branches[()] = [*text(10), *header, NEWLINE, Tag.END_GOAL, *end]
    return {branch_key(0, number, path): [int(token) for token in ids] for path, ids in branches.items()}
