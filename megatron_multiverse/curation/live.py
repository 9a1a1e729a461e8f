"""Many samples at the same time against an endpoint that answers at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

from megatron_multiverse.curation.checkers import Checkers
from megatron_multiverse.curation.desk import End
from megatron_multiverse.curation.exchange import Answer, Failure, Request
from megatron_multiverse.curation.inputs import Sample
from megatron_multiverse.curation.prices import Budget, BudgetReached, Prices
from megatron_multiverse.curation.providers.protocol import Provider, ProviderError

logger = logging.getLogger(__name__)

TRIES = 3
"""How often one request is sent, each time with the retries of the provider, before its sample is set aside."""
_GIVE_UP_AFTER = 20
"""So many failed requests in a row mean that the provider, not the requests, is at fault."""
_SPARE_SAMPLES = 16
"""Samples beyond the limit of requests: while the answers of these are kept and checked, others ask."""
PREPARED = 4
"""Requests beyond the limit that the provider makes ready, so that one goes out as soon as an answer is there."""
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
    """Drives samples, `concurrency` requests at a time.

    Args:
        provider: whom to ask; it sends at most `concurrency` requests at the same time.
        spending: what it may cost.
        concurrency: requests at the same time.
        checkers: who keeps and checks the answers.
        on_end: called with each sample that has ended.

    Attributes:
        stopped: why no more requests are sent, though samples are left; None as long as they are.
    """

    def __init__(
        self,
        provider: Provider,
        spending: Spending,
        concurrency: int,
        checkers: Checkers,
        on_end: Callable[[Sample, End], None],
    ) -> None:
        self.provider = provider
        self.spending = spending
        self.stopped: str | None = None
        self._concurrency = concurrency
        self._checkers = checkers
        self._on_end = on_end
        self._slots = asyncio.Semaphore(concurrency + PREPARED)
        self._failed_in_a_row = 0
        self._error: ProviderError | None = None

    def stop(self, reason: str) -> None:
        """Make no more requests; those under way or ready are still awaited and kept, since they are paid."""
        self.stopped = self.stopped or reason

    async def run(self, samples: Iterator[Sample]) -> None:
        """Until all have ended, or the run is stopped.

        Raises:
            ProviderError: the provider takes no request; what was answered by then has been kept.
            OSError: an answer cannot be written.
        """
        workers = [self._work(samples) for _ in range(self._concurrency + _SPARE_SAMPLES)]
        ended = await asyncio.gather(*workers, return_exceptions=True)
        errors = [self._error, *ended]
        if (error := next((error for error in errors if error is not None), None)) is not None:
            raise error

    async def _work(self, samples: Iterator[Sample]) -> None:
        # The iterator is shared: each worker takes the next sample when it is done with one.
        while self.stopped is None and (sample := next(samples, None)) is not None:
            try:
                await self._curate(sample)
            except Exception as error:
                # The others hear and keep the answers that are under way, since they are paid.
                self.stop(f"{type(error).__name__}: {error}")
                raise

    async def _curate(self, sample: Sample) -> None:
        turn = await self._checkers.begin(sample)
        while turn.request is not None:
            answer = await self._ask(turn.request)
            if answer is None:
                return
            # Not in the slot, which would be idle meanwhile.
            turn = await self._checkers.hear(sample.name, answer)
        assert turn.end is not None
        self._on_end(sample, turn.end)

    async def _ask(self, request: Request) -> Answer | Failure | None:
        """An answer, or the failure after the last try; None if the run has been stopped."""
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
            if isinstance(answer, Answer) or answer.is_final:
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
