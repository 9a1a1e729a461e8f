"""The questions of each stage. Everything here is a function of its arguments; answers.py reads what comes back.

The stages of the paper (arXiv 2506.09991, section 5.1) are: summary tree, parallel groups, parallel structure, refill
of the original text, and Map and Reduce parts with rewritten paths. A model is asked in the first, second and fifth.
The third and fourth follow from the line numbers it names, so they cost nothing and keep every character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_multiverse.curation.chain import Chain
from megatron_multiverse.curation.exchange import Effort, Request, Stage
from megatron_multiverse.curation.plan import KINDS, Step
from megatron_multiverse.curation.prompts import fill
from megatron_multiverse.structure import Block, render

_THINKING_TOKENS: dict[Effort, int] = {"low": 6_000, "medium": 13_000, "high": 24_000, "xhigh": 48_000, "max": 80_000}
"""Room for thinking. Only a limit: what is not used is not paid."""
_PLAN_TOKENS = 8_000
_CHARACTERS_PER_TOKEN = 2.5
MAX_OUTPUT_TOKENS = 128_000
"""The largest answer that today's models give."""


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_TEXT, _LINE = {"type": "string"}, {"type": "integer"}
PLAN_SCHEMA = _object(
    {
        "steps": _array(
            _object(
                {
                    "title": _TEXT,
                    "first_line": _LINE,
                    "substeps": _array(_object({"title": _TEXT, "first_line": _LINE})),
                }
            )
        ),
        "groups": _array(
            _object(
                {
                    "kind": {"type": "string", "enum": list(KINDS)},
                    "members": _array(_object({"step": _TEXT, "needs": _array(_TEXT)})),
                }
            )
        ),
    }
)
"""One schema for two stages, because a provider's prompt cache holds for one schema only."""
VERDICT_SCHEMA = _object(
    {
        "verdicts": _array(
            _object(
                {"block": _LINE, "path": _TEXT, "is_independent": {"type": "boolean"}, "reason": _TEXT},
            )
        )
    }
)


class Questions:
    """Makes the requests about one chain.

    Args:
        chain: the chain.
        effort: how much a model may think.
        is_cached: whether the chain is marked for the prompt cache.
    """

    def __init__(self, chain: Chain, effort: Effort, *, is_cached: bool) -> None:
        self.chain = chain
        self.effort = effort
        self.is_cached = is_cached
        self._shared = fill("shared", numbered=chain.numbered())

    def outline(self, attempt: int, reason: str | None, scale: int = 1) -> Request:
        """Stage 1."""
        task = fill("outline", num_lines=str(self.chain.num_lines))
        return self._ask("outline", attempt, task, reason, _PLAN_TOKENS, scale, PLAN_SCHEMA)

    def groups(self, steps: Sequence[Step], attempt: int, reason: str | None, scale: int = 1) -> Request:
        """Stage 2."""
        task = fill("groups", outline=outline_text(steps))
        return self._ask("groups", attempt, task, reason, _PLAN_TOKENS, scale, PLAN_SCHEMA)

    def rewrite(
        self, drafts: Sequence[tuple[Block, tuple[int, int]]], attempt: int, reason: str | None, scale: int = 1
    ) -> Request:
        """Stage 5: blocks with the lines that they were made from."""
        blocks = _blocks_text(drafts)
        count = "one block" if len(drafts) == 1 else f"{len(drafts)} blocks"
        task = fill("rewrite", blocks=blocks, count=count)
        return self._ask("rewrite", attempt, task, reason, int(1.5 * len(blocks) / _CHARACTERS_PER_TOKEN), scale)

    def judge(self, blocks: Sequence[tuple[Block, tuple[int, int]]], attempt: int, scale: int = 1) -> Request:
        """The optional question whether paths are independent."""
        task = fill("judge", blocks=_blocks_text(blocks))
        return self._ask("judge", attempt, task, None, _PLAN_TOKENS, scale, VERDICT_SCHEMA)

    def _ask(
        self,
        stage: Stage,
        attempt: int,
        task: str,
        reason: str | None,
        answer_tokens: int,
        scale: int,
        schema: dict[str, Any] | None = None,
    ) -> Request:
        max_tokens = min((_THINKING_TOKENS[self.effort] + answer_tokens) * scale, MAX_OUTPUT_TOKENS)
        return Request(
            stage=stage,
            attempt=attempt,
            system=fill("system"),
            shared=self._shared,
            task=task + (fill("retry", attempt=str(attempt), reason=reason) if reason else ""),
            max_tokens=max_tokens,
            schema=schema,
            is_cached=self.is_cached and schema is PLAN_SCHEMA,
        )


def outline_text(steps: Sequence[Step]) -> str:
    """The outline for a prompt."""
    lines = []
    for step in steps:
        lines.append(f"{step.number} (lines {step.first}-{step.last}): {step.title}")
        lines += [f"  {sub.number} (lines {sub.first}-{sub.last}): {sub.title}" for sub in step.substeps]
    return "\n".join(lines)


def _blocks_text(blocks: Sequence[tuple[Block, tuple[int, int]]]) -> str:
    texts = []
    for number, (block, (first, last)) in enumerate(blocks, 1):
        texts.append(f"Block {number}, lines {first}-{last}:\n{render((block,))}")
    return "\n\n".join(texts)
