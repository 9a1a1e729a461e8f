"""The answers that one HTTP request asks for, while they are made."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from megatron_multiverse.config import SamplingParams
from megatron_multiverse.inference.text.result import Result, TopLogprobs
from megatron_multiverse.server.errors import ApiError
from megatron_multiverse.server.logprobs import TokenLogprobs
from megatron_multiverse.structure import Thought


class Write(NamedTuple):
    """What a branch wrote at once."""

    branch: str
    ids: list[int]
    logprob: float | None
    """Of the one id, if it was drawn; None for ids that were forced."""
    top: TopLogprobs | None
    """The most likely ids beside it, where they were asked for."""
    stop: tuple[int, str] | None = None
    """Where the ids close a branch that ended at a stop text: how many tokens before them hold some of that text, and
    what of the text of these tokens is kept."""

    @property
    def tokens(self) -> list[TokenLogprobs]:
        """The ids with what is known of them."""
        return [TokenLogprobs(token, self.logprob, self.top or []) for token in self.ids]


class Canceller(Protocol):
    """Ends answers by their numbers: an `EngineClient`."""

    def cancel(self, numbers: Iterable[int]) -> None:
        """End answers; numbers of complete ones are ignored."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request asks of the engine."""

    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    count: int = 1
    """Answers to each prompt; those to one prompt follow each other."""
    cache_salt: str | None = None
    priority: int = 0
    """Of the answers among those that wait; a smaller number comes first."""
    rids: Sequence[str] = ()
    """Names of the prompts, to abort them by."""
    replay_structure: Sequence[tuple[int, int]] = ()
    """Where in the prompt, which is the only one then, earlier answers stand whose blocks are laid out again."""
    answer_start: Sequence[int] = ()
    """Ids that each answer begins with."""
    thought: Thought | None = None
    """Where the prompt leaves the answers, see `inference.Request`."""


@dataclasses.dataclass(eq=False)
class Generation:
    """One answer in the making."""

    number: int
    batch: Batch
    rid: str | None
    started: float
    writes: list[Write] = dataclasses.field(default_factory=list)
    """What was written and nobody has taken yet; only of streams."""
    accepted: bool = False
    """Whether the engine has taken it."""
    result: Result | None = None
    """The answer, once it is complete."""
    is_told: bool = False
    """Whether `Batch.news` has given the result."""


class Batch:
    """The answers that one HTTP request asks for.

    Args:
        client: where they are made, an `EngineClient`.
        deadline: seconds until they are cancelled; they end with finish_reason "abort" then.
    """

    def __init__(self, client: Canceller, deadline: float) -> None:
        self.generations: list[Generation] = []
        self._client = client
        self._changed = asyncio.Event()
        self._error: ApiError | None = None
        self._timer = asyncio.get_running_loop().call_later(deadline, self.cancel)

    async def accepted(self) -> None:
        """Wait until the engine has taken all of them.

        Raises:
            ApiError: it refused one, or died; the others are cancelled.
        """
        while not all(generation.accepted for generation in self.generations):
            await self._news()

    async def results(self) -> list[Result]:
        """All answers, complete.

        Raises:
            ApiError: the engine died.
        """
        while not self.is_complete:
            await self._news()
        return [generation.result for generation in self.generations if generation.result is not None]

    async def news(self, timeout: float) -> list[tuple[int, list[Write], Result | None]]:
        """What happened since the last call: (index, what was written, the answer if it is now complete) for each
        answer that has news; nothing after `timeout` seconds without any.

        Raises:
            ApiError: the engine died.
        """
        found = self._take_news()
        if not found:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._news()
            found = self._take_news()
        return found

    def _take_news(self) -> list[tuple[int, list[Write], Result | None]]:
        found = []
        for index, generation in enumerate(self.generations):
            writes, generation.writes = generation.writes, []
            result = None if generation.is_told else generation.result
            generation.is_told = generation.result is not None
            if writes or result is not None:
                found.append((index, writes, result))
        return found

    @property
    def is_complete(self) -> bool:
        """Whether all answers are."""
        return all(generation.result is not None for generation in self.generations)

    def cancel(self) -> None:
        """End all that go on, with all their branches, in the engine's next step."""
        self._timer.cancel()
        self._client.cancel(generation.number for generation in self.generations)

    def tell(self, error: ApiError | None = None) -> None:
        """There is news."""
        if error is not None and self._error is None:
            self._error = error
            self.cancel()
        if self.is_complete:
            self._timer.cancel()
        self._changed.set()

    async def _news(self) -> None:
        await self._changed.wait()
        self._changed.clear()
        if self._error is not None:
            raise self._error
