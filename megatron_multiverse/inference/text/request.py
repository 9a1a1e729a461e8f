"""What goes into the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_multiverse.config.sampling import SamplingParams, whole_number
from megatron_multiverse.errors import GenerationError


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
    """Token ids; tags among them are inert. Kept as a tuple, so that what is done to the list later changes nothing."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How the answer is drawn, and where it ends."""
    sample: int = 0
    """Number of the answer, to draw several to one prompt with one seed."""
    cache_salt: str = ""
    """Requests share what was computed for their beginning only with those of the same salt: with one salt for each
    tenant, none can tell from the time of an answer what another asked."""
    accept: Callable[[Try], bool] | None = None
    """Whether a path that has ended succeeds, where `SamplingParams.commit_after` asks. All requests wait for it, so it
    should take microseconds. If it raises, its request ends with `error`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", tuple(whole_number("prompt_ids", token) for token in self.prompt_ids))
        object.__setattr__(self, "sample", whole_number("sample", self.sample))
        if self.accept is not None and not self.sampling.commit_after:
            raise GenerationError("accept says which paths succeed; set commit_after in the sampling parameters, too")
        if not self.prompt_ids:
            raise GenerationError("prompt_ids is empty; give at least one token")
