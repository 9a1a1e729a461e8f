"""When pages run short or a step fails: who steps back, who starts again, who ends.

A request that steps back gives up its place in the cache and keeps its text. Once admitted again it is fed from its
prompt on, in chunks, forks and joins included; nothing is drawn twice, so its answer is the same.
"""

from __future__ import annotations

from megatron_multiverse.inference.scheduler import Scheduler
from megatron_multiverse.inference.text.commit import close_all
from megatron_multiverse.inference.text.state import RequestState

MAX_FAILURES = 3
"""A request that was active in so many failed steps and got no token between them ends, so that an engine never fails
for ever."""


def preempt(scheduler: Scheduler, state: RequestState) -> None:
    """Take back everything the request holds; of its priority it is the next to be admitted, once as many pages are
    free."""
    state.preemptions += 1
    state.pages_wanted = len({page for pages in scheduler.places.pages_of(state) for page in pages}) + 1
    scheduler.remove(state)
    scheduler.queue(state, first=True)


def relieve(scheduler: Scheduler) -> None:
    """No branch can get a page: the newest request of the least priority steps back; the last one ends."""
    newest = scheduler.active[-1]
    if len(scheduler.active) > 1:
        preempt(scheduler, newest)
        return
    book = scheduler.book
    newest.error = (
        f"the cache is full: {book.num_pages} pages of {book.page_size} tokens do not hold all branches; "
        "raise num_pages"
    )
    newest.counts["out_of_pages"] += 1
    close_all(newest, "length")


def restart(scheduler: Scheduler) -> None:
    """Nothing computed so far is to be read again: all active requests step back, to start again in their order."""
    for state in reversed(scheduler.active.copy()):
        preempt(scheduler, state)
    scheduler.places.prefixes.clear()


def recover(scheduler: Scheduler, error: BaseException) -> list[RequestState]:
    """A step raised: all active requests start again; returns those that end instead, closed.

    Args:
        scheduler: in whatever state the exception left it.
        error: what was raised. Only an `Exception` counts as a failure; an interrupt is nobody's fault.
    """
    stopped = scheduler.active
    scheduler.reset()
    ended = []
    for state in stopped:
        state.failures += isinstance(error, Exception)
        if state.failures >= MAX_FAILURES:
            state.error = f"{MAX_FAILURES} steps failed without a token between them, the last with {error!r}"
            scheduler.remove(state)
            close_all(state, "error")
            ended.append(state)
    return ended
