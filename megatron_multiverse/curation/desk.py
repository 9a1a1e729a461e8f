"""What happens to a sample between two requests: its answer is kept and checked, and the next question made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_multiverse.curation.conversation import Conversation
from megatron_multiverse.curation.exchange import Answer, Failure, Request
from megatron_multiverse.curation.inputs import ChainColumns, Sample, output_columns
from megatron_multiverse.curation.pipeline import Passed
from megatron_multiverse.curation.prices import Prices
from megatron_multiverse.curation.rules import Rules
from megatron_multiverse.curation.run_folder import sample_state


@dataclass(frozen=True)
class End:
    """How a sample has ended."""

    has_passed: bool
    unfinished: dict[str, Any] | None = None
    """Why it could not be finished though nothing is wrong with it: the provider failed. It is not written to the disk,
    so the next start takes the sample up again."""


@dataclass(frozen=True)
class Turn:
    """Where a sample stands: `request` is its open question, `end` how it has ended; one of them is None."""

    request: Request | None
    end: End | None


@dataclass(frozen=True)
class Desk:
    """Takes answers to samples and writes the outcomes down.

    Args:
        folder: the folder of the run.
        rules: what a sample has to pass.
        columns: which columns of a sample hold what.
        prices: None if they are not known.
        made_by: what every row says about how it was made.
    """

    folder: Path
    rules: Rules
    columns: ChainColumns
    prices: Prices | None
    made_by: Mapping[str, Any]

    def open(self, sample: Sample) -> Conversation:
        """Take a sample up where its kept answers end."""
        return Conversation(sample, sample_state(self.folder, sample.name), self.rules)

    def tell(self, talk: Conversation, answer: Answer | Failure) -> None:
        """Keep an answer to the open question, then go on with it.

        Raises:
            OSError: it cannot be written.
        """
        assert talk.request is not None
        if isinstance(answer, Answer):
            # Before the sample asks anything else, so a killed run loses at most one answer for each sample.
            talk.state.keep(talk.request, answer)
        talk.tell(answer)

    def turn(self, talk: Conversation) -> Turn:
        """Where the sample stands; an outcome is on the disk when this returns."""
        if talk.request is not None:
            return Turn(talk.request, None)
        return Turn(None, self.finish(talk))

    def finish(self, talk: Conversation) -> End:
        """Write down how a sample has ended.

        Raises:
            OSError: it cannot be written.
        """
        outcome = talk.outcome
        assert outcome is not None
        dollars = self._dollars(talk)
        if isinstance(outcome, Passed):
            row = output_columns(talk.sample, self.columns, outcome)
            curation = {**outcome.details, "dollars": dollars, **self.made_by}
            talk.state.finish({"row": row, "curation": curation})
            return End(has_passed=True)
        entry = {"code": outcome.code, "reason": outcome.reason, "history": outcome.history, "dollars": dollars}
        if outcome.code == "provider":
            return End(has_passed=False, unfinished=entry)
        talk.state.finish(entry)
        return End(has_passed=False)

    def _dollars(self, talk: Conversation) -> float:
        if self.prices is None:
            return 0.0
        answers = talk.state.answers.values()
        return sum(self.prices.cost(answer.usage, is_batch=answer.is_batch) for answer in answers)
