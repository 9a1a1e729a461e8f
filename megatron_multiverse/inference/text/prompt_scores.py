"""Log-probabilities of a prompt, as its chunks are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_multiverse.inference.text.result import TopLogprobs


@dataclass
class PromptScores:
    """What the model thought of each token of a prompt; one for all answers to it."""

    answers: list[int]
    """Numbers of the answers that go on. The pass of the first over the prompt gives the scores; the others wait for
    them, and should it end too early, the next one gives them."""
    prompt_length: int
    logprobs: list[float | None] = field(default_factory=lambda: [None])
    """As far as they are known; nothing comes before the first token."""
    top_logprobs: list[TopLogprobs | None] = field(default_factory=lambda: [None])

    @property
    def complete(self) -> bool:
        """Whether the whole prompt is scored."""
        return len(self.logprobs) >= self.prompt_length

    def leave(self, answer: int) -> None:
        """An answer has ended."""
        self.answers.remove(answer)

    def put(self, first: int, logprobs: Sequence[float], top_logprobs: Sequence[TopLogprobs | None]) -> None:
        """Take the scores of the tokens from `first` on; those that are known already stay."""
        known = len(self.logprobs) - first
        assert known >= 0, "chunks come in their order"
        self.logprobs += logprobs[known:]
        self.top_logprobs += top_logprobs[known:]
