"""Tokens that end an answer, or a path, before its budget does; stop texts are found by `scanner.py`."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_multiverse.config.sampling import SamplingParams
from megatron_multiverse.inference.text.branch import Branch


def ends(params: SamplingParams, branch: Branch, token: int) -> bool:
    """Whether a drawn token ends the branch instead of becoming part of it."""
    if token == branch.machine.vocab.eos_id and not params.ignore_eos:
        return True
    return (branch.parent is None or params.stop_in_branches) and token in params.stop_token_ids


def banned_ids(params: SamplingParams, branch: Branch, *, ahead: int = 0) -> Sequence[int]:
    """Ids that may not be drawn now, since the answer has fewer than `min_tokens`.

    Args:
        params: of the request.
        branch: draws the next token.
        ahead: tokens that are drawn before it, but not written yet.
    """
    if branch.parent is not None or branch.total + ahead >= params.min_tokens:
        return ()
    eos = branch.machine.vocab.eos_id
    return (*(() if eos is None or params.ignore_eos else (eos,)), *params.stop_token_ids)
