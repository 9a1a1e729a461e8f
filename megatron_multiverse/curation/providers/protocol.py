"""What the curator needs of a provider. The class of another vendor needs these members and nothing else."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from typing import Protocol, runtime_checkable

from megatron_multiverse.curation.exchange import Answer, Failure, Request
from megatron_multiverse.errors import MultiverseError


class ProviderError(MultiverseError, RuntimeError):
    """The provider takes no request of ours: a wrong key, an unknown model, an empty account. It ends the run."""


class Unreachable(MultiverseError, RuntimeError):
    """A call about a batch that failed for a reason that passes by.

    Args:
        reason: for the log.
        may_have_arrived: whether the provider may have done what was asked, and only its answer got lost.
    """

    def __init__(self, reason: str, *, may_have_arrived: bool) -> None:
        super().__init__(reason)
        self.may_have_arrived = may_have_arrived


class Provider(Protocol):
    """Answers single requests.

    It is asked for a few more answers than may be under way, and holds that limit itself, at its connections: so the
    next request is ready when one of them is free.

    Attributes:
        label: vendor and model, for reports.
    """

    label: str

    async def complete(self, request: Request) -> Answer | Failure:
        """Ask; retries for what passes by (overload, rate limits, connections) are the provider's.

        Raises:
            ProviderError: no request would be taken.
        """

    async def count_tokens(self, request: Request) -> int | None:
        """Tokens of the prompt as they would be billed; None if the provider cannot tell."""

    async def close(self) -> None:
        """Let go of connections."""


@runtime_checkable
class BatchProvider(Provider, Protocol):
    """Also takes many requests at once, for less, and answers when it likes.

    Every method may raise `Unreachable`, after which it can be called again, and `ProviderError`.
    """

    max_batch_requests: int
    max_batch_bytes: int

    async def submit(self, requests: Mapping[str, Request]) -> str:
        """Hand over requests by custom id (letters, digits, ``_`` and ``-``, at most 64); returns the batch's id."""

    async def find(self, prefix: str, size: int, since: float) -> str | None:
        """The id of a batch whose custom ids begin with `prefix`: one that was handed over, but whose id got lost.

        A provider does not show the custom ids of a batch before it has ended, so this waits for batches of the same
        size that are under way.

        Args:
            prefix: what no other batch's custom ids begin with.
            size: number of requests.
            since: no batch made before this time (seconds since 1970) is looked at.
        """

    async def has_ended(self, batch: str) -> bool:
        """Whether the results are there."""

    def results(self, batch: str) -> AsyncIterator[tuple[str, Answer | Failure]]:
        """Custom ids with answers, in any order."""

    def size_in_bytes(self, request: Request) -> int:
        """What the request adds to the size of a batch."""


def redact(text: str, *secrets: str | None) -> str:
    """The text without the secrets, which an echoing server or a proxy may have put into an error."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[key]")
    return text


def key_from(variable: str) -> str | None:
    """The key in an environment variable, without white space around it; None if there is none."""
    return os.environ.get(variable, "").strip() or None
