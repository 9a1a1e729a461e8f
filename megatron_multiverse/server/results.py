"""Results of the engine as plain data, and back."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from megatron_multiverse.inference.text.result import (
    BlockResult,
    BranchResult,
    DroppedText,
    EndDraw,
    Result,
    StopMatch,
    TimelineSpan,
    TopLogprobs,
)


def result_to_dict(result: Result) -> dict[str, Any]:
    """Everything known of an answer, in lists, maps, numbers and texts."""
    # Not `asdict` of the whole: it would copy the lists of tokens one number at a time.
    fields = dict(vars(result))
    fields["blocks"] = [asdict(block) for block in result.blocks]
    fields["malformed"] = dict(result.malformed)
    return fields


def result_from_dict(fields: dict[str, Any]) -> Result:
    """The inverse of `result_to_dict`."""
    fields = dict(fields)
    blocks = fields.pop("blocks")
    timeline = fields.pop("timeline")
    malformed = fields.pop("malformed")
    stops, ends = fields.pop("stops"), fields.pop("ends")
    top, prompt_top = fields.pop("top_logprobs"), fields.pop("prompt_top_logprobs")
    return Result(
        **fields,
        blocks=[_block_from_dict(block) for block in blocks],
        timeline=[TimelineSpan(*span) for span in timeline],
        malformed=Counter(malformed),
        stops=[StopMatch(*stop) for stop in stops],
        ends=[EndDraw(*end) for end in ends],
        top_logprobs=None if top is None else [_pairs(likely) for likely in top],
        prompt_top_logprobs=None if prompt_top is None else [_pairs(likely) for likely in prompt_top],
    )


def _pairs(likely: list[list[Any]] | None) -> TopLogprobs | None:
    return None if likely is None else [(token, logprob) for token, logprob in likely]


def _block_from_dict(block: dict[str, Any]) -> BlockResult:
    return BlockResult(**{**block, "branches": [_branch_from_dict(branch) for branch in block["branches"]]})


def _branch_from_dict(branch: dict[str, Any]) -> BranchResult:
    path = tuple((number, path) for number, path in branch["path"])
    dropped = None if branch["dropped"] is None else DroppedText(*branch["dropped"])
    return BranchResult(**{**branch, "path": path, "dropped": dropped})
