"""When pages run short or a step fails: who steps back, who starts again, who ends.

A request that steps back gives up its cache and keeps its text. Once admitted again it starts from its prompt and
replays the tokens it had sampled (`commit.resume`), feeding them in chunks, so its answer is the same.
"""

from __future__ import annotations

from megatron_multiverse.inference.request_state import RequestState
from megatron_multiverse.inference.scheduler import Scheduler

MAX_FAILURES = 3
"""A request that was active in so many failed steps in a row ends, so that an engine never fails for ever."""


def preempt(scheduler: Scheduler, request: RequestState) -> None:
    """Take back everything the request holds; it is the next to be admitted, once as many pages are free."""
    request.preemptions += 1
    request.pages_wanted = len({page for pages in scheduler.pages_of(request) for page in pages}) + 1
    scheduler.remove(request)
    scheduler.waiting.appendleft(request)


def relieve(scheduler: Scheduler) -> None:
    """No branch can get a page: the prompts kept for later go, then the newest request; the last one ends."""
    if scheduler.prefixes.clear():
        return
    newest = scheduler.active[-1]
    if len(scheduler.active) > 1:
        preempt(scheduler, newest)
        return
    pool = scheduler.pool
    newest.error = (
        f"the cache is full: {pool.num_pages} pages of {pool.page_size} tokens do not hold all branches; "
        "raise num_pages"
    )
    newest.counts["out_of_pages"] += 1
    newest.close_all("length")


def recover(scheduler: Scheduler, error: BaseException) -> list[RequestState]:
    """A step raised: all active requests start again; returns those that end instead, closed.

    Args:
        scheduler: in whatever state the exception left it.
        error: what was raised. Only an `Exception` counts as a failure; an interrupt is nobody's fault.
    """
    stopped = scheduler.active
    scheduler.reset()
    ended = []
    for request in stopped:
        request.failures += isinstance(error, Exception)
        if request.failures >= MAX_FAILURES:
            request.error = f"{MAX_FAILURES} steps in a row failed, the last with {error!r}"
        elif not request.callback_failed:
            continue
        scheduler.remove(request)
        request.close_all("error")
        ended.append(request)
    return ended
