"""One sample under way: the question that waits for an answer, after all answers that are kept have been heard."""

from __future__ import annotations

from megatron_multiverse.curation.exchange import Answer, Failure, Request
from megatron_multiverse.curation.inputs import Sample
from megatron_multiverse.curation.pipeline import Outcome, SetAside, curate_chain
from megatron_multiverse.curation.rules import Rules
from megatron_multiverse.curation.run_folder import SampleState


class Conversation:
    """Runs the pipeline of one sample as far as kept answers go.

    Args:
        sample: what to curate.
        state: its kept answers.
        rules: what it has to pass.

    Attributes:
        request: the open question; None once there is an outcome.
        outcome: how it ended; None while a question is open.
        failures: why the open question has no answer yet, one entry for each try.
    """

    def __init__(self, sample: Sample, state: SampleState, rules: Rules) -> None:
        self.sample = sample
        self.state = state
        self.request: Request | None = None
        self.outcome: Outcome | None = None
        self.failures: list[str] = []
        if sample.problem:
            self.outcome = SetAside("input", sample.problem, [])
            return
        self._dialogue = curate_chain(sample.chain, rules)
        self._advance(None)

    def tell(self, answer: Answer | Failure) -> None:
        """Go on with the answer to `request`. The caller has kept it."""
        self.failures = []
        self._advance(answer)

    def _advance(self, answer: Answer | Failure | None) -> None:
        try:
            while True:
                request = next(self._dialogue) if answer is None else self._dialogue.send(answer)
                answer = self.state.answers.get(request.key)
                if answer is None:
                    self.request = request
                    return
        except StopIteration as end:
            self.request, self.outcome = None, end.value
