"""What a step needs to know about rows that ask for more than a temperature: from requests and branches to arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from megatron_multiverse.inference.step.plan import Floats, Ints, Shaping, StepOutput
from megatron_multiverse.inference.text.branch import Branch
from megatron_multiverse.inference.text.state import RequestState

_NONE = np.zeros(0, dtype=np.int64)
_NO_MASK = np.zeros(0, dtype=np.int32)
NO_SCORES = {"scored": _NONE, "targets": _NONE, "num_scores": _NONE}
"""What `scored_arrays` gives for nothing."""


Sampled = tuple[RequestState, Branch, int]
"""Whom a token belongs to, and how many tokens of the branch come before it. If the branch has others by the time the
token comes, it is dropped. (Plain tuples: each step makes one per row.)"""


class Scored(NamedTuple):
    """A piece of a prompt whose log-probabilities are asked for."""

    state: RequestState
    token: int
    """Number of its first token in the step."""
    first: int
    """Index of that token in the prompt; what is scored is the token after it."""
    num_tokens: int


def scored_arrays(scored: Sequence[Scored]) -> dict[str, Ints]:
    """The fields of a `StepPlan` that ask for log-probabilities of known tokens; at least one piece."""
    targets = [token for piece in scored for token in piece.state.root.ids[piece.first + 1 :][: piece.num_tokens]]
    counts = [piece.num_tokens for piece in scored]
    tops = [piece.state.request.sampling.prompt_logprobs or 0 for piece in scored]
    return {
        "scored": np.concatenate([piece.token + np.arange(piece.num_tokens) for piece in scored]),
        "targets": np.array(targets, dtype=np.int64),
        "num_scores": np.repeat(np.array(tops, dtype=np.int64), counts),
    }


def keep_scores(scored: Sequence[Scored], output: StepOutput) -> None:
    """Give requests the log-probabilities of these pieces of their prompts."""
    start = 0
    for state, _, first, count in scored:
        end, top = start + count, state.request.sampling.prompt_logprobs or 0
        if state.scores is not None:
            tops = [output.score_top(index, top) for index in range(start, end)]
            state.scores.put(first + 1, output.scores[start:end].tolist(), tops)
        start = end


def shaping_arrays(sampled: Sequence[Sampled], coming: Mapping[Branch, tuple[int, int]]) -> Shaping | None:
    """What changes the distributions of the next tokens of these branches; None if nothing does.

    Args:
        sampled: the branches.
        coming: (row, length before it) of the draws in flight.
    """
    params = [state.request.sampling for state, _, _ in sampled]
    banned = [_banned_ids(row) for row in sampled]
    if not any(banned) and not any(p.is_shaped for p in params):
        return None
    biases: list[tuple[int, int, float]] = []
    for row, p in enumerate(params):
        bias = p.logit_bias | dict.fromkeys(banned[row], -np.inf)
        biases += [(row, token, value) for token, value in bias.items()]
    rows = [row for row, p in enumerate(params) if p.has_penalties]
    seen = [sampled[row][1].seen for row in rows]
    guides = [
        (row, branch.guide.mask())
        for row, (_, branch, _) in enumerate(sampled)
        if branch.guide is not None and branch.guide.holds
    ]
    exempt = sampled[0][1].machine.vocab.tag_ids

    def floats(values: Sequence[float]) -> Floats:
        return np.array(values, dtype=np.float64)

    return Shaping(
        top_k=np.array([p.top_k for p in params], dtype=np.int64),
        top_p=floats([p.top_p for p in params]),
        min_p=floats([p.min_p for p in params]),
        num_logprobs=np.array([p.logprobs for p in params], dtype=np.int64),
        bias_rows=np.array([row for row, _, _ in biases], dtype=np.int64),
        bias_ids=np.array([token for _, token, _ in biases], dtype=np.int64),
        biases=floats([value for _, _, value in biases]),
        penalised=np.array(rows, dtype=np.int64),
        repetition=floats([params[row].repetition_penalty for row in rows]),
        presence=floats([params[row].presence_penalty for row in rows]),
        frequency=floats([params[row].frequency_penalty for row in rows]),
        coming=np.array([_coming_row(sampled[row], coming) for row in rows], dtype=np.int64),
        seen_rows=np.repeat(np.arange(len(rows)), [len(counts.ids) for counts in seen if counts]),
        seen_ids=np.concatenate([_NONE, *(counts.ids for counts in seen if counts)]),
        seen_counts=np.concatenate([_NONE, *(counts.counts for counts in seen if counts)]),
        exempt=np.array(exempt, dtype=np.int64),
        guided=np.array([row for row, _ in guides], dtype=np.int64),
        masks=np.concatenate([_NO_MASK, *(mask for _, mask in guides)]),
    )


def _banned_ids(sampled: Sampled) -> frozenset[int]:
    """Ids that may not be drawn now, since the answer has fewer than `min_tokens`."""
    state, branch, length = sampled
    total = branch.total + length - len(branch.ids)  # the last token may be drawn, but not written yet
    return branch.end_ids if branch.parent is None and total < state.request.sampling.min_tokens else frozenset()


def _coming_row(sampled: Sampled, coming: Mapping[Branch, tuple[int, int]]) -> int:
    """The row of the step in flight that draws the token before this one; -1 where that is known."""
    _, branch, length = sampled
    return coming[branch][0] if length > len(branch.ids) else -1
