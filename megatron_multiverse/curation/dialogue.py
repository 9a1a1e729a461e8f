"""Asking a model until an answer can be used: attempts, refusals, answers that were cut off, and a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import asdict
from typing import Any, TypeVar

from megatron_multiverse.curation.answers import Problem
from megatron_multiverse.curation.exchange import STAGES, Answer, Failure, Request, Stage

T = TypeVar("T")
Dialogue = Generator[Request, Answer | Failure, T]
"""Asks and is told: it yields requests, is sent an answer or a failure for each, and returns a T."""
MakeRequest = Callable[[int, str | None, int], Request]
"""(attempt, what was wrong with the answer before, by how much the room for the answer has grown) -> request."""


class GiveUp(Exception):
    """The sample is set aside; `code` is a short stable reason."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Interview:
    """The questions about one sample and what came of them.

    Args:
        max_attempts: how often a stage may ask before it gives up.

    Attributes:
        history: one entry for each question: stage, attempt, stop reason, usage, and the problem if there was one.
    """

    def __init__(self, max_attempts: int) -> None:
        self.max_attempts = max_attempts
        self.history: list[dict[str, Any]] = []
        self.attempts: Counter[Stage] = Counter()
        self._scale: dict[Stage, int] = dict.fromkeys(STAGES, 1)

    def ask(self, stage: Stage, make: MakeRequest, reason: str | None = None) -> Dialogue[Answer]:
        """Ask once.

        Args:
            stage: which stage asks.
            make: makes the request.
            reason: what was wrong with the answer before.

        Raises:
            GiveUp: there is no answer, and asking again would bring none.
            Problem: the answer was cut off; the next one gets more room.
        """
        self.attempts[stage] += 1
        answer = yield make(self.attempts[stage], reason, self._scale[stage])
        entry: dict[str, Any] = {"stage": stage, "attempt": self.attempts[stage]}
        self.history.append(entry)
        if isinstance(answer, Failure):
            raise self._give_up("provider", answer.reason)
        entry |= {"stop": answer.stop, "model": answer.model, "usage": asdict(answer.usage), "batch": answer.is_batch}
        if answer.stop == "refusal":
            # The same prompt would be refused again, so asking again would only cost.
            raise self._give_up("refusal", answer.refusal)
        if answer.stop == "context_window":
            raise self._give_up("context_window", "the chain does not fit into the context window of the model")
        if answer.stop == "max_tokens":
            self._scale[stage] *= 2
            raise self.note(Problem("the answer was cut off because it was too long"))
        return answer

    def until_good(
        self,
        stage: Stage,
        make: MakeRequest,
        read: Callable[[str], T],
        reason: str | None = None,
        *,
        limit: int | None = None,
    ) -> Dialogue[T]:
        """Ask until the text of an answer can be read.

        Raises:
            GiveUp: see `ask`; also once the stage has asked `limit` times, by default `max_attempts`.
        """
        while self.attempts[stage] < (self.max_attempts if limit is None else limit):
            try:
                answer = yield from self.ask(stage, make, reason)
                return read(answer.text)
            except Problem as problem:
                reason = str(self.note(problem))
        raise GiveUp(stage, reason or "no attempt is left")

    def note(self, problem: Problem) -> Problem:
        """Record what is wrong with the last answer."""
        self.history[-1]["problem"] = str(problem)
        return problem

    def _give_up(self, code: str, reason: str) -> GiveUp:
        self.history[-1]["problem"] = f"{code}: {reason}"
        return GiveUp(code, reason)
