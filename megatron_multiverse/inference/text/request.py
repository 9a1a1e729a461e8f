"""What goes into the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

from megatron_multiverse.config.sampling import SamplingParams, whole_number
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.structure import Thought


class Try(NamedTuple):
    """A path that has ended, for `Request.accept`."""

    name: str
    """"2.1" is the first path of a block inside a second path."""
    outline: str
    """Its label as its outline writes it."""
    text: str
    """All it wrote, tags kept, from `<Path>` to `</Path>`."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue.

    Raises:
        GenerationError: no tokens, or ids that are not whole numbers.
    """

    prompt_ids: Sequence[int]
    """Token ids; tags among them are inert, but for `replay_structure` and `thought`. Kept as a tuple, so that what is
    done to the list later changes nothing."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How the answer is drawn, and where it ends."""
    sample: int = 0
    """Number of the answer, to draw several to one prompt with one seed."""
    cache_salt: str = ""
    """Requests share what was computed for their beginning only with those of the same salt: with one salt for each
    tenant, none can tell from the time of an answer what another asked."""
    priority: int = 0
    """Requests with a smaller number come first: they wait before the others, and their prompts are read before the
    others'. Nothing that runs is interrupted for them, but when pages run out those of the largest number step back."""
    accept: Callable[[Try], bool] | None = None
    """Whether a path that has ended succeeds, where `SamplingParams.commit_after` asks. All requests wait for it, so it
    should take microseconds. If it raises, its request ends with `error`."""
    replay_structure: tuple[tuple[int, int], ...] = ()
    """[start, end) in `prompt_ids` of each earlier answer of the model whose blocks are to be laid out as they were
    generated: paths beside each other, what follows after the longest of them. Elsewhere, and without it everywhere,
    tags are text, read causally."""
    answer_start: Sequence[int] = ()
    """What the answer begins with, as ids that nobody draws. Unlike a prompt's its tags count: the header of a block,
    up to its `</Goal>`, forks, so a client can say what is to be done in parallel. Counts towards the budgets."""

    thought: Thought | None = None
    """Where the prompt leaves the answer: in a thought, whose end its grammar then waits for, after one, so that its
    grammar holds from the first token on, or neither. None: in a thought if the ids end by opening one
    (`structure.opens_thought`), else neither."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", tuple(whole_number("prompt_ids", token) for token in self.prompt_ids))
        start = tuple(whole_number("answer_start", token) for token in self.answer_start)
        object.__setattr__(self, "answer_start", start)
        if self.thought not in (None, *get_args(Thought)):
            allowed = ", ".join(get_args(Thought))
            raise GenerationError(f"thought is {self.thought!r}; give one of {allowed}, or None to go by the prompt")
        object.__setattr__(self, "sample", whole_number("sample", self.sample))
        object.__setattr__(self, "priority", whole_number("priority", self.priority))
        if self.accept is not None and not self.sampling.commit_after:
            raise GenerationError("accept says which paths succeed; set commit_after in the sampling parameters, too")
        pairs = [[whole_number("replay_structure", border) for border in pair] for pair in self.replay_structure]
        spans = tuple((start, end) for start, end in pairs)
        object.__setattr__(self, "replay_structure", spans)
        borders = [0, *(border for span in spans for border in span), len(self.prompt_ids)]
        if borders != sorted(borders) or (spans and spans[-1][1] == len(self.prompt_ids)):
            raise GenerationError(
                f"replay_structure is {list(spans)} in a prompt of {len(self.prompt_ids)} tokens; give [start, end) "
                "of each answer in turn, none beyond the end, and at least one token of the next turn after the last"
            )
        if spans and self.sampling.prompt_logprobs is not None:
            raise GenerationError(
                "prompt_logprobs are those of a prompt read as text; leave out replay_structure, or prompt_logprobs"
            )
        if not self.prompt_ids:
            raise GenerationError("prompt_ids is empty; give at least one token")
