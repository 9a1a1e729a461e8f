"""Many samples at the same time against an endpoint that answers at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from megatron_multiverse.curation.conversation import Conversation
from megatron_multiverse.curation.exchange import Answer, Failure, Request
from megatron_multiverse.curation.prices import Budget, BudgetReached, Prices
from megatron_multiverse.curation.providers.protocol import Provider, ProviderError
from megatron_multiverse.curation.run_folder import SampleState

logger = logging.getLogger(__name__)

TRIES = 3
"""How often one request is sent, each time with the retries of the provider, before its sample is set aside."""
_GIVE_UP_AFTER = 20
"""So many failed requests in a row mean that the provider, not the requests, is at fault."""
_SPARE_CONVERSATIONS = 16
"""Conversations beyond the limit of requests: while these write an answer to the disk, others ask."""
_FIRST_WAIT_S = 1.0


class Spending:
    """What answers cost, kept below the limit.

    Args:
        prices: None if they are not known.
        budget: the limit.
        is_batch: whether answers come by batches.
    """

    def __init__(self, prices: Prices | None, budget: Budget, *, is_batch: bool) -> None:
        self.prices = prices
        self.budget = budget
        self.is_batch = is_batch

    def most(self, request: Request) -> float:
        """Dollars that a request can cost at most."""
        return self.prices.most(request, is_batch=self.is_batch) if self.prices is not None else 0.0

    def cost(self, answer: Answer | Failure) -> float:
        """Dollars that an answer has cost."""
        if self.prices is None or isinstance(answer, Failure):
            return 0.0
        return self.prices.cost(answer.usage, is_batch=answer.is_batch)


class LiveRunner:
    """Drives conversations, `concurrency` requests at a time.

    Args:
        provider: whom to ask.
        spending: what it may cost.
        concurrency: requests at the same time.
        finish: called with each conversation that has an outcome.

    Attributes:
        stopped: why no more requests are sent, though samples are left; None as long as they are.
    """

    def __init__(
        self,
        provider: Provider,
        spending: Spending,
        concurrency: int,
        finish: Callable[[Conversation], Awaitable[None]],
    ) -> None:
        self.provider = provider
        self.spending = spending
        self.stopped: str | None = None
        self._concurrency = concurrency
        self._finish = finish
        self._slots = asyncio.Semaphore(concurrency)
        self._failed_in_a_row = 0
        self._error: ProviderError | None = None

    def stop(self, reason: str) -> None:
        """Send no more requests; answers under way are still awaited and kept, since they are paid."""
        self.stopped = self.stopped or reason

    async def run(self, conversations: Iterator[Conversation]) -> None:
        """Until all have an outcome, or the run is stopped.

        Raises:
            ProviderError: the provider takes no request; what was answered by then has been kept.
            OSError: an answer cannot be written.
        """
        number = self._concurrency + _SPARE_CONVERSATIONS
        # asyncio's own threads are few, and each waits for the disk most of the time.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(number))
        workers = [self._work(conversations) for _ in range(number)]
        ended = await asyncio.gather(*workers, return_exceptions=True)
        errors = [self._error, *ended]
        if (error := next((error for error in errors if error is not None), None)) is not None:
            raise error

    async def _work(self, conversations: Iterator[Conversation]) -> None:
        # The iterator is shared: each worker takes the next sample when it is done with one.
        while self.stopped is None and (conversation := next(conversations, None)) is not None:
            try:
                await self._talk(conversation)
            except Exception as error:
                # The others hear and keep the answers that are under way, since they are paid.
                self.stop(f"{type(error).__name__}: {error}")
                raise

    async def _talk(self, conversation: Conversation) -> None:
        while (request := conversation.request) is not None:
            answer = await self._ask(request, conversation.state)
            if answer is None:
                return
            conversation.tell(answer)
        await self._finish(conversation)

    async def _ask(self, request: Request, state: SampleState) -> Answer | Failure | None:
        """An answer that has been kept, or the failure after the last try; None if the run has been stopped."""
        answer: Answer | Failure = Failure("not asked")
        for number in range(TRIES):
            if number:
                await asyncio.sleep(_FIRST_WAIT_S * 2**number)
            async with self._slots:
                if self.stopped is not None:
                    return None
                most = self.spending.most(request)
                try:
                    await self.spending.budget.reserve(most)
                except BudgetReached:
                    self.stop(f"the next request could cost ${most:.2f} and exceed --max-cost-usd")
                    return None
                answer = Failure("not asked")
                try:
                    answer = await self.provider.complete(request)
                except ProviderError as error:
                    self._error = error
                    self.stop(str(error))
                    return None
                finally:
                    await self.spending.budget.settle(most, self.spending.cost(answer))
            self._watch(answer)
            if isinstance(answer, Answer):
                # Not in the slot, which a slow disk would keep idle. Before the sample asks anything else, so a killed
                # run loses at most one answer for each conversation.
                await asyncio.to_thread(state.keep, request, answer)
                return answer
            if answer.is_final:
                return answer
            logger.debug("%s: %s", request.stage, answer.reason)
        return answer

    def _watch(self, answer: Answer | Failure) -> None:
        self._failed_in_a_row = 0 if isinstance(answer, Answer) else self._failed_in_a_row + 1
        if self._failed_in_a_row >= _GIVE_UP_AFTER and isinstance(answer, Failure) and self._error is None:
            self._error = ProviderError(
                f"{self._failed_in_a_row} requests in a row have failed, the last one with: {answer.reason}. Run the "
                "same command again to go on"
            )
            self.stop(str(self._error))
