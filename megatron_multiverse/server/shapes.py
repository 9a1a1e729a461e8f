"""The objects of answers: usage, and what is special about Multiverse."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from megatron_multiverse.inference.record import to_record
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server.answer import Piece
from megatron_multiverse.server.errors import ApiError


def head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What every object of an answer begins with: an id of its own, its kind, the time and the model's name."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(results: Sequence[Result], prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What answers used. Each prompt counts once, however many answers it got; tokens of all branches count.

    Args:
        results: the answers.
        prompts: the prompts, each once.
    """
    completion = sum(len(result.token_ids) for result in results)
    critical = sum(result.critical_tokens for result in results)
    in_branches = sum(
        block.branches[-1].end - block.branches[0].start
        for result in results
        for block in result.blocks
        if not block.parent  # inner blocks lie within outer ones
    )
    return usage_so_far(prompts, completion) | {
        # Of each prompt, as of its tokens: what the other answers found, the first one had computed for them.
        "prompt_tokens_details": {
            "cached_tokens": sum(result.cached_tokens for result in results if not result.sample)
        },
        "critical_tokens": critical,
        "branch_tokens": in_branches,
        "num_parallel": round(completion / critical, 4) if critical else 1.0,
    }


def usage_so_far(prompts: Sequence[Sequence[int]], completion: int) -> dict[str, Any]:
    """The part of `usage` that is known before answers are complete."""
    prompt = sum(map(len, prompts))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def multiverse(result: Result, *, tree: bool) -> dict[str, Any]:
    """The object `multiverse` of one answer.

    Args:
        result: the answer.
        tree: whether to tell everything known of every token.
    """
    blocks = [
        {
            "id": block.number,
            "parent": block.parent,
            "branches": [
                {
                    "branch": branch.name,
                    "outline": branch.outline,
                    "tokens": branch.end - branch.start,
                    "finish_reason": branch.finish,
                    "forced_close": branch.finish != "path_end",
                }
                for branch in block.branches
            ],
        }
        for block in result.blocks
    ]
    found: dict[str, Any] = {
        "critical_tokens": result.critical_tokens,
        "num_parallel": round(result.num_parallel, 4),
        "decode_steps": result.decode_steps,
        "preemptions": result.preemptions,
        "dropped_tokens": result.dropped_tokens,
        "malformed": dict(result.malformed),
        "blocks": blocks,
    }
    if tree:
        record = to_record(result)
        del record["request_id"], record["error"]  # the number is the engine's own, the error may name files
        found["tree"] = record
    return found


def branch_label(piece: Piece) -> dict[str, Any]:
    """What a chunk of a stream in branches says beside its text. Never inside `delta`: the SDK's helper adds up what it
    does not know there."""
    if piece.branch is None:
        return {}
    label: dict[str, Any] = {"branch": piece.branch, "block": piece.block, "tokens": len(piece.tokens)}
    if piece.opens:
        label["event"] = "open"
    elif piece.closes:
        label["event"] = "close"
    return {"multiverse": label}


def check_result(result: Result) -> None:
    """Refuse to pass on an answer that failed.

    Raises:
        ApiError: 422 where the model broke the grammar and the request asked for an error then (`on_malformed`); else
            500. What failed stands in the log of the engine; its text is not for clients.
    """
    if result.finish_reason == "error" and result.malformed["refused"]:
        raise ApiError(422, result.error, code="malformed_output")
    if result.finish_reason == "error":
        raise ApiError(500, "the engine failed on this request; the log of the server says more", code="engine_error")
