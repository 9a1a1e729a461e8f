"""Drives the pipeline without a provider."""

from __future__ import annotations

from collections.abc import Callable

from megatron_multiverse.curation.exchange import Answer, Failure, Request, Usage
from megatron_multiverse.curation.pipeline import Outcome, curate_chain
from megatron_multiverse.curation.rules import Rules
from tests.unit.curation.scripted import Script

Reply = Callable[[Request, str], Answer | Failure | str]
"""(request, the right answer) -> what is answered instead."""


def right(request: Request, answer: str) -> str:
    """The right answer."""
    return answer


def drive(script: Script, rules: Rules, reply: Reply = right) -> tuple[Outcome, list[Request]]:
    """The outcome, and all that was asked."""
    dialogue = curate_chain(script.text, rules)
    asked: list[Request] = []
    try:
        request = next(dialogue)
        while True:
            asked.append(request)
            answer = reply(request, script.answer(request.stage, request.task))
            request = dialogue.send(
                Answer(answer, "end", "m", Usage(1, 0, 0, 1)) if isinstance(answer, str) else answer
            )
    except StopIteration as end:
        return end.value, asked
