"""What comes out of the engine: the answer as text order has it, with everything known about each token."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]
BranchFinish = Literal["path_end", "eos", "stop", "length", "dropped", "abort", "error"]

BY_ENGINE = frozenset(("forced_close", "fork_refused"))
"""Codes of `Result.malformed` that say what the engine did, as at the end of a budget. What the model wrote has others,
beside these or alone."""

TopLogprobs = list[tuple[int, float]]
"""(id, log-probability) of the most likely tokens, the most likely first."""


class StopMatch(NamedTuple):
    """A stop text that ended an answer or a path."""

    text: str
    """As `SamplingParams.stop` has it."""
    start: int
    """The first token that holds some of it."""
    end: int
    """After the last one; what follows closes the structure."""
    kept: str
    """What stays of the text of these tokens: what stands before it, and with `SamplingParams.include_stop` itself."""


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


class EndDraw(NamedTuple):
    """A token that the model drew to end a branch, and that is no part of its text: the end-of-document id, or a stop
    token."""

    parent: int
    """Index in the answer of the token that it was drawn after, -1 for the last of the prompt."""
    token: int
    logprob: float
    """As in `Result.logprobs`."""


class DroppedText(NamedTuple):
    """What a try had written when its block was committed, and is no part of the answer; what it forked included, in
    text order."""

    token_ids: list[int]
    position_ids: list[int]
    logprobs: list[float | None]


@dataclass
class BranchResult:
    """One path of a block; tokens [start, end) of the answer."""

    name: str
    path: tuple[tuple[int, int], ...]
    """(block in its parent, path in that block), both from 0, from the root down: unlike the name it is unique."""
    outline: str
    """Its label as written."""
    start: int
    end: int
    finish: BranchFinish
    """`path_end`: the model wrote `</Path>`; else the engine closed it. `dropped`: another try succeeded before."""
    stop_reason: str | int | None = None
    """The stop text or stop token that ended it."""
    dropped: DroppedText | None = None
    """What it had written when it was dropped."""


@dataclass
class BlockResult:
    """One forked block of the answer, in text order (outer before inner)."""

    number: int
    parent: str
    """Name of the branch that forked."""
    branches: list[BranchResult] = field(default_factory=list)


@dataclass
class Result:
    """The answer to one request. Lists over its tokens are in text order, without the end-of-document id."""

    request_id: int
    prompt_ids: list[int]
    token_ids: list[int]
    position_ids: list[int]
    """Position of each token (the prompt takes 0 .. prompt - 1, less if `Request.replay_structure` lays out paths)."""
    logprobs: list[float | None]
    """Log-probability of each token the model drew, under its own distribution (temperature 1, nothing filtered);
    None for tokens the engine forced."""
    top_logprobs: list[TopLogprobs | None] | None
    """For each drawn token the most likely ones of that distribution, None for forced tokens; None altogether where the
    request did not ask for them (`SamplingParams.logprobs`)."""
    labels: list[int]
    """Visibility label r of each token as training has it: token i sees an earlier token j iff r[j] <= r[i]. The
    prompt's labels are 0 .. prompt - 1, but for paths of `Request.replay_structure`."""
    parents: list[int]
    """Index of the token before each token on its own branch (for the first token of a path: on the branch that
    forked), -1 for the last of the prompt. A sampled token was drawn from the logits of its parent."""
    blocks: list[BlockResult]
    finish_reason: FinishReason
    critical_tokens: int
    """Tokens on the longest chain."""
    decode_steps: int
    """Forward passes that gave the answer a token."""
    malformed: Counter[str]
    """How often the output broke the grammar (codes of structure.StructureMachine; `unclosed` where the model ended its
    text in something open) and what the engine did about it: `forced_close`, `fork_refused`, and `refused` for the
    answer that ended for it (`on_malformed`)."""
    timeline: list[TimelineSpan]
    seed: int = 0
    """Of its sampling parameters."""
    sample: int = 0
    """Number of the answer to its prompt."""
    stop_reason: str | int | None = None
    """The stop text or stop token that ended the answer."""
    stops: list[StopMatch] = field(default_factory=list)
    """Where stop texts ended the answer or its paths, in text order."""
    ends: list[EndDraw] = field(default_factory=list)
    """What was drawn to end branches without becoming text, in text order."""
    weight_versions: list[int] = field(default_factory=list)
    """For each token the version of the weights (`Engine.use_weights`) when it was written."""
    dropped_tokens: int = 0
    """Tokens of tries that were dropped; they count towards `max_tokens`."""
    freed_pages: int = 0
    """Pages that came free when they were."""
    prompt_logprobs: list[float | None] | None = None
    """Log-probability of each token of the prompt, None for the first; shorter where the request ended before its
    prompt was read, None where it did not ask."""
    prompt_top_logprobs: list[TopLogprobs | None] | None = None
    """Beside each the most likely ones; None for the first, and altogether where the request did not ask."""
    cached_tokens: int = 0
    """Tokens of the prompt that other requests had computed."""
    preemptions: int = 0
    error: str = ""
    """Why, if finish_reason is "error" or memory ran out."""

    @property
    def sampled(self) -> list[bool]:
        """For each token whether the model drew it; the engine forced the others."""
        return [logprob is not None for logprob in self.logprobs]

    @property
    def late_paths(self) -> int:
        """Paths that began when a path of the same block had ended already, as in waves of paths that find no room."""
        lives: dict[int, dict[str, tuple[int, int]]] = {}
        for span in self.timeline:  # in the order of their starts
            if span.block:
                paths = lives.setdefault(span.block, {})
                paths[span.branch] = (paths.get(span.branch, span[2:])[0], span.end)
        return sum(
            start >= min(end for _, end in paths.values()) for paths in lives.values() for start, _ in paths.values()
        )

    @property
    def num_parallel(self) -> float:
        """Generated tokens per token of the longest chain."""
        return len(self.token_ids) / self.critical_tokens if self.critical_tokens else 1.0
