"""What a step needs to know to draw a token for each of its rows: from requests and branches to arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_multiverse.config.sampling import SamplingParams
from megatron_multiverse.inference.step.plan import Ints, SamplingArrays, Shaping
from megatron_multiverse.inference.text.branch import Branch
from megatron_multiverse.inference.text.state import RequestState
from megatron_multiverse.inference.text.stops import banned_ids

_NONE = np.zeros(0, dtype=np.int64)


class Sampled(NamedTuple):
    """Whom a token belongs to."""

    state: RequestState
    branch: Branch
    length: int
    """Tokens of the branch before it. If the branch has others by the time the token comes, it is dropped."""


class Scored(NamedTuple):
    """A piece of a prompt whose log-probabilities are asked for."""

    state: RequestState
    token: int
    """Number of its first token in the step."""
    first: int
    """Index of that token in the prompt; what is scored is the token after it."""
    num_tokens: int


def scored_arrays(scored: Sequence[Scored]) -> dict[str, Ints]:
    """The fields of a `StepPlan` that ask for log-probabilities of known tokens."""
    if not scored:
        return {"scored": _NONE, "targets": _NONE, "num_scores": _NONE}
    targets = [token for piece in scored for token in piece.state.root.ids[piece.first + 1 :][: piece.num_tokens]]
    counts = [piece.num_tokens for piece in scored]
    tops = [piece.state.request.sampling.prompt_logprobs or 0 for piece in scored]
    return {
        "scored": np.concatenate([piece.token + np.arange(piece.num_tokens) for piece in scored]),
        "targets": np.array(targets, dtype=np.int64),
        "num_scores": np.repeat(np.array(tops, dtype=np.int64), counts),
    }


def sampling_arrays(sampled: Sequence[Sampled], draws: Sequence[int], coming: Sequence[int]) -> SamplingArrays:
    """How each of these branches draws its next token.

    Args:
        sampled: the branches.
        draws: index of the token among those its branch draws.
        coming: the row of the step in flight that draws the token before it; -1 where that is known.
    """
    params = [state.request.sampling for state, _, _ in sampled]
    banned = [
        banned_ids(p, branch, ahead=length - len(branch.ids)) if p.min_tokens else ()
        for p, (_, branch, length) in zip(params, sampled, strict=True)
    ]
    shaped = any(p.is_shaped for p in params) or any(banned)
    return SamplingArrays(
        keys=np.array([branch.key for _, branch, _ in sampled], dtype=np.int64),
        indices=np.array(draws, dtype=np.int64),
        temperature=np.array([p.temperature for p in params], dtype=np.float64),
        shaping=_shaping(sampled, params, banned, coming) if shaped else None,
    )


def _shaping(
    sampled: Sequence[Sampled],
    params: Sequence[SamplingParams],
    banned: Sequence[Sequence[int]],
    coming: Sequence[int],
) -> Shaping:
    biases: list[tuple[int, int, float]] = []
    for row, p in enumerate(params):
        bias = p.logit_bias | dict.fromkeys(banned[row], -np.inf)
        biases += [(row, token, value) for token, value in bias.items()]
    rows = [row for row, p in enumerate(params) if p.has_penalties]
    seen = [sampled[row].branch.seen for row in rows]
    exempt = sampled[0].branch.machine.vocab.tag_ids

    def floats(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
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
        coming=np.array([coming[row] for row in rows], dtype=np.int64),
        seen_rows=np.repeat(np.arange(len(rows)), [len(counts.ids) for counts in seen if counts]),
        seen_ids=np.concatenate([_NONE, *(counts.ids for counts in seen if counts)]),
        seen_counts=np.concatenate([_NONE, *(counts.counts for counts in seen if counts)]),
        exempt=np.array(exempt, dtype=np.int64),
    )
