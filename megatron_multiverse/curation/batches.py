"""Many samples by batches: each round hands over the open question of every sample, and hears the answers."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from megatron_multiverse.curation.conversation import Conversation
from megatron_multiverse.curation.exchange import Answer, Failure
from megatron_multiverse.curation.live import TRIES, Spending
from megatron_multiverse.curation.providers.protocol import BatchProvider, Unreachable
from megatron_multiverse.curation.run_folder import BatchState, RunFolder, SampleState

logger = logging.getLogger(__name__)

_WAVE = 2_000
"""Samples that are under way at the same time; each holds its chain in memory."""
_CLOCK_TOLERANCE_S = 600.0


class BatchRunner:
    """Drives conversations by batches.

    Args:
        provider: whom to ask.
        spending: what it may cost.
        folder: where batches are written down, before and after they are handed over.
        poll_s: seconds between two looks at a batch.
        finish: called with each conversation that has an outcome; writes it down.

    Attributes:
        stopped: why no more batches are handed over, though samples are left; None as long as they are.
    """

    def __init__(
        self,
        provider: BatchProvider,
        spending: Spending,
        folder: RunFolder,
        poll_s: float,
        finish: Callable[[Conversation], None],
    ) -> None:
        self.provider = provider
        self.spending = spending
        self.stopped: str | None = None
        self._folder = folder
        self._poll_s = poll_s
        self._finish = finish

    def stop(self, reason: str) -> None:
        """Hand over no more; batches under way are found again by the next start."""
        self.stopped = self.stopped or reason

    async def collect(self) -> None:
        """Fetch what earlier starts have handed over and not fetched. Answers belong to samples that need not be open.

        Raises:
            ProviderError: the provider takes no request.
        """
        for batch in list(self._folder.batches()):
            if batch.is_fetched:
                continue
            if batch.batch is None:
                batch.batch = await self._find(batch)
                if batch.batch is None:
                    batch.forget()
                    continue
                batch.save()
            logger.info("fetching batch %s of an earlier start", batch.batch)
            await self._fetch(batch, {})

    async def run(self, conversations: Iterator[Conversation]) -> None:
        """Until all have an outcome, or the run is stopped.

        Raises:
            ProviderError: the provider takes no request; batches under way are found again by the next start.
        """
        while self.stopped is None and (wave := list(islice(conversations, _WAVE))):
            while self.stopped is None and (wave := self._settled(wave)):
                await self._round(wave)

    def _settled(self, wave: Iterable[Conversation]) -> list[Conversation]:
        """Finish those that have an outcome; the others are left."""
        left = []
        for conversation in wave:
            if conversation.request is None:
                self._finish(conversation)
            else:
                left.append(conversation)
        return left

    async def _round(self, wave: Sequence[Conversation]) -> None:
        reserved = []
        for conversation in wave:
            assert conversation.request is not None
            most = self.spending.most(conversation.request)
            if not self.spending.budget.fits(most):
                break
            await self.spending.budget.reserve(most)
            reserved.append((conversation, most))
        if not reserved:
            self.stop("the next request could exceed --max-cost-usd")
            return
        batches = [await self._hand_over(part) for part in self._parts([talk for talk, _ in reserved])]
        states = {talk.sample.name: talk.state for talk, _ in reserved}
        answers: dict[str, Answer | Failure] = {}
        for batch in batches:
            answers |= await self._fetch(batch, states)
        for conversation, most in reserved:
            answer = answers.get(conversation.sample.name, Failure("the results of the batch do not hold this request"))
            await self.spending.budget.settle(most, self.spending.cost(answer))
            self._hear(conversation, answer)

    def _hear(self, conversation: Conversation, answer: Answer | Failure) -> None:
        if isinstance(answer, Failure) and not answer.is_final:
            conversation.failures.append(answer.reason)
            if len(conversation.failures) < TRIES:
                return  # asked again in the next round
        conversation.tell(answer)

    def _parts(self, wave: Sequence[Conversation]) -> Iterator[list[Conversation]]:
        """Cut into batches that the provider takes."""
        part: list[Conversation] = []
        size = 0
        for conversation in wave:
            assert conversation.request is not None
            added = self.provider.size_in_bytes(conversation.request)
            if part and (len(part) >= self.provider.max_batch_requests or size + added > self.provider.max_batch_bytes):
                yield part
                part, size = [], 0
            part.append(conversation)
            size += added
        yield part

    async def _hand_over(self, part: Sequence[Conversation]) -> BatchState:
        """Write the batch down, hand it over, write its id down: wherever the run is killed, it can be found again."""
        name = secrets.token_hex(8)
        requests = {f"{name}-{k}": talk.request for k, talk in enumerate(part) if talk.request is not None}
        keys = {
            custom_id: (talk.sample.name, f"{request.stage}:{request.key}")
            for talk, (custom_id, request) in zip(part, requests.items(), strict=True)
        }
        state = self._folder.new_batch(name, keys)
        while state.batch is None:
            try:
                state.batch = await self.provider.submit(requests)
            except Unreachable as error:
                logger.warning("handing over a batch: %s", error)
                await asyncio.sleep(self._poll_s)
                if error.may_have_arrived:
                    state.batch = await self._find(state)
        state.save()
        logger.info("batch %s: %d requests", state.batch, len(requests))
        return state

    async def _find(self, batch: BatchState) -> str | None:
        while True:
            try:
                return await self.provider.find(f"{batch.name}-", len(batch.requests), batch.made - _CLOCK_TOLERANCE_S)
            except Unreachable as error:
                await self._wait("looking for a batch", error)

    async def _fetch(self, batch: BatchState, states: Mapping[str, SampleState]) -> dict[str, Answer | Failure]:
        """Wait for a batch and keep its answers, in these states or on the disk alone; returns them by sample."""
        assert batch.batch is not None
        found: dict[str, Answer | Failure] = {}
        while True:
            try:
                while not await self.provider.has_ended(batch.batch):
                    await asyncio.sleep(self._poll_s)
                async for custom_id, answer in self._known(batch):
                    sample, key = batch.requests[custom_id]
                    found[sample] = answer
                    if isinstance(answer, Answer):
                        stage, _, request = key.partition(":")
                        state = states.get(sample) or self._folder.sample(sample)
                        await asyncio.to_thread(state.keep_by_key, request, stage, answer)
                break
            except Unreachable as error:
                await self._wait(f"batch {batch.batch}", error)
        batch.is_fetched = True
        batch.save()
        return found

    async def _known(self, batch: BatchState) -> AsyncIterator[tuple[str, Answer | Failure]]:
        assert batch.batch is not None
        async for custom_id, answer in self.provider.results(batch.batch):
            if custom_id in batch.requests:
                yield custom_id, answer

    async def _wait(self, what: str, error: Unreachable) -> None:
        logger.warning("%s: %s; trying again", what, error)
        await asyncio.sleep(self._poll_s)
