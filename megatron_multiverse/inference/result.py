"""What comes out of the engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]
BranchFinish = Literal["path_end", "eos", "length", "abort", "error"]


class TimelineSpan(NamedTuple):
    """A stretch in which one branch ran without interruption; steps are counted from the request's first."""

    branch: str
    """"" is the root, "2" the second path, "2.1" the first path of a block inside it."""
    block: int
    """Number of the block the branch belongs to, in the order of forking; 0 is the root."""
    start: int
    end: int
    """Half-open."""
    tokens: int


@dataclass
class BranchResult:
    """One path of a block; tokens [start, end) of the answer."""

    name: str
    outline: str
    """Its label as written."""
    start: int
    end: int
    finish: BranchFinish
    """`path_end`: the model wrote `</Path>`; else the engine closed it."""


@dataclass
class BlockResult:
    """One forked block of the answer, in text order (outer before inner)."""

    number: int
    parent: str
    """Name of the branch that forked."""
    branches: list[BranchResult] = field(default_factory=list)


@dataclass
class Result:
    """The answer to one request."""

    request_id: int
    token_ids: list[int]
    """The answer in text order, without the end-of-document id."""
    position_ids: list[int]
    """Position of each token of the answer (the prompt takes 0 .. prompt - 1)."""
    blocks: list[BlockResult]
    finish_reason: FinishReason
    critical_tokens: int
    """Tokens on the longest chain."""
    decode_steps: int
    """Forward passes that advanced the answer."""
    malformed: Counter[str]
    """How often the output broke the grammar (codes of structure.StructureMachine) and what the engine did
    about it (`forced_close`, `fork_refused`)."""
    timeline: list[TimelineSpan]
    preemptions: int = 0
    error: str = ""
    """Why, if finish_reason is "error" or memory ran out."""

    @property
    def num_parallel(self) -> float:
        """Generated tokens per token of the longest chain."""
        return len(self.token_ids) / self.critical_tokens if self.critical_tokens else 1.0
