"""Anthropic's Messages and Message Batches, through the vendor's SDK (2.x)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from megatron_multiverse.curation.exchange import Answer, Effort, Failure, Request, Stop, Usage
from megatron_multiverse.curation.providers.own_server import OwnServer
from megatron_multiverse.curation.providers.protocol import ProviderError, Unreachable, redact
from megatron_multiverse.errors import ConfigError

_STREAM_ABOVE = 21_333
"""Beyond this max_tokens the SDK refuses a request that is not streamed: it could take longer than ten minutes."""
_STOPS: dict[str, Stop] = {
    "end_turn": "end",
    "stop_sequence": "end",
    "max_tokens": "max_tokens",
    "refusal": "refusal",
    "model_context_window_exceeded": "context_window",
}
_NO_KEY = (
    "no key for Anthropic: set ANTHROPIC_API_KEY (create one in the Console under API keys; the SDK's "
    "ANTHROPIC_AUTH_TOKEN and profiles work too). --provider openai asks a server of your own, and --dry-run tries the "
    "pipeline without any model"
)
_KEY_HELP = {401: "check ANTHROPIC_API_KEY", 402: "add credit or raise the spend limit", 404: "check --model"}


class AnthropicProvider:
    """See `protocol.BatchProvider`.

    Args:
        model: name of the model.
        effort: how much it may think.
        base_url: another endpoint; default is the SDK's.
        concurrency: most requests on the wire at the same time.
        max_retries: how often the SDK tries again what passes by.
        timeout_s: longest wait for an answer that is not streamed, or for the next piece of one that is.
        poll_s: seconds between two looks at a batch.

    Raises:
        ConfigError: the package or the key is missing.
    """

    max_batch_requests = 100_000
    max_batch_bytes = 200_000_000

    def __init__(
        self,
        model: str,
        effort: Effort,
        *,
        base_url: str | None = None,
        concurrency: int = 16,
        max_retries: int = 6,
        timeout_s: float = 600.0,
        poll_s: float = 30.0,
    ) -> None:
        try:
            import anthropic
            import httpx2
        except ImportError as error:
            raise ConfigError("anthropic is not installed: pip install 'megatron-multiverse[curate]'") from error
        self.label = f"anthropic {model}"
        self.model = model
        self.effort = effort
        self.poll_s = poll_s
        self._sdk = anthropic
        self._server = OwnServer(base_url)
        self._client = anthropic.AsyncAnthropic(
            base_url=base_url,
            max_retries=max_retries,
            timeout=httpx2.Timeout(timeout_s, pool=None),  # waiting for a free connection is no fault
            # The SDK's other transport: two thirds of the CPU time for each answer.
            http_client=anthropic.DefaultAioHttpClient(limits=httpx2.Limits(max_connections=concurrency)),
            # Telemetry is on by default where a provider for it is configured; prompts are nobody else's business.
            open_telemetry=False,
        )
        client = self._client
        if client.api_key is None and client.auth_token is None and client.credentials is None:
            raise ConfigError(_NO_KEY)

    async def close(self) -> None:
        """See `Provider`."""
        await self._client.close()

    async def complete(self, request: Request) -> Answer | Failure:
        """See `Provider`."""
        try:
            message = await self._server.ask(lambda: self._message(request))
        except Exception as error:
            return self._failure(error)
        return self._answer(message, is_batch=False)

    async def _message(self, request: Request) -> Any:
        params = self._params(request)
        if request.max_tokens <= _STREAM_ABOVE:
            return await self._client.messages.create(**params)
        async with self._client.messages.stream(**params) as stream:
            return await stream.get_final_message()

    async def count_tokens(self, request: Request) -> int | None:
        """See `Provider`."""
        params = self._params(request)
        del params["max_tokens"]
        try:
            counted: Any = await self._server.ask(lambda: self._client.messages.count_tokens(**params))
        except Exception as error:
            failure = self._failure(error)
            raise ProviderError(f"tokens cannot be counted: {failure.reason}") from None
        return int(counted.input_tokens)

    async def submit(self, requests: Mapping[str, Request]) -> str:
        """See `BatchProvider`."""
        rows: Any = [{"custom_id": name, "params": self._params(request)} for name, request in requests.items()]
        # Without the SDK's retries: a batch whose answer got lost may have been taken, and would be paid twice.
        with self._call():
            return str((await self._client.with_options(max_retries=0).messages.batches.create(requests=rows)).id)

    async def find(self, prefix: str, size: int, since: float) -> str | None:
        """See `BatchProvider`."""
        found = []
        with self._call():
            async for batch in self._batches.list(limit=100):
                if batch.created_at.timestamp() < since:
                    break  # the newest come first
                counts = batch.request_counts
                total = counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
                if total == size and batch.archived_at is None:
                    found.append(batch.id)
        for candidate in found:
            while not await self.has_ended(candidate):
                await asyncio.sleep(self.poll_s)
            async for name, _ in self.results(candidate):
                if name.startswith(prefix):
                    return str(candidate)
                break
        return None

    async def has_ended(self, batch: str) -> bool:
        """See `BatchProvider`."""
        with self._call():
            return bool((await self._batches.retrieve(batch)).processing_status == "ended")

    async def results(self, batch: str) -> AsyncIterator[tuple[str, Answer | Failure]]:
        """See `BatchProvider`."""
        with self._call():
            rows = await self._batches.results(batch)
        while True:
            with self._call():
                row = await anext(rows, None)
            if row is None:
                return
            yield row.custom_id, self._result(row.result)

    def _result(self, result: Any) -> Answer | Failure:
        # By its type alone: the SDK reads a kind of result that it does not know as a success without a message.
        if result.type == "succeeded":
            return self._answer(result.message, is_batch=True)
        if result.type == "errored":
            error = result.error.error
            return Failure(self._redact(f"{error.type}: {error.message}"), error.type == "invalid_request_error")
        return Failure(f"the batch has {result.type} before this request was processed")

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """A call about a batch: what goes wrong is `Unreachable` or a `ProviderError`."""
        try:
            yield
        except Exception as error:
            failure = self._failure(error)
            if failure.is_final:
                raise ProviderError(failure.reason) from None
            status = getattr(error, "status_code", None)
            raise Unreachable(failure.reason, may_have_arrived=status not in (429, 529)) from None

    def size_in_bytes(self, request: Request) -> int:
        """See `BatchProvider`."""
        return len(json.dumps(self._params(request))) + 100

    @property
    def _batches(self) -> Any:
        return self._client.messages.batches

    def _params(self, request: Request) -> dict[str, Any]:
        shared: dict[str, Any] = {"type": "text", "text": request.shared}
        if request.is_cached:
            shared["cache_control"] = {"type": "ephemeral"}
        config: dict[str, Any] = {"effort": self.effort}
        if request.schema is not None:
            config["format"] = {"type": "json_schema", "schema": request.schema}
        return {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "system": request.system,
            "messages": [{"role": "user", "content": [shared, {"type": "text", "text": request.task}]}],
            "output_config": config,
        }

    def _answer(self, message: Any, *, is_batch: bool) -> Answer | Failure:
        # A proxy may answer 200 with something else, which the SDK hands over as text, a list or nothing.
        if not isinstance(message, self._sdk.types.Message) or message.usage is None:
            return Failure(f"the answer is no message but {type(message).__name__}")
        if message.stop_reason not in _STOPS:
            return Failure(f"the answer ended without a known reason ({message.stop_reason})")
        usage = message.usage
        details = usage.output_tokens_details
        return Answer(
            # Thinking comes first, so blocks are chosen by their type.
            text="".join(block.text for block in message.content if block.type == "text"),
            stop=_STOPS[message.stop_reason],
            model=str(message.model),
            usage=Usage(
                input=usage.input_tokens,
                cache_write=usage.cache_creation_input_tokens or 0,
                cache_read=usage.cache_read_input_tokens or 0,
                output=usage.output_tokens,
                thinking=(details.thinking_tokens or 0) if details is not None else 0,
            ),
            refusal=_refusal(message),
            is_batch=is_batch,
            raw=message.to_dict(mode="json"),
        )

    def _failure(self, error: Exception) -> Failure:
        """What an exception of the SDK, or of what lies below it, means for one request.

        Raises:
            ProviderError: it would be the same for every request.
        """
        reason = self._redact(f"{type(error).__name__}: {error}")
        status = getattr(error, "status_code", None)
        if status in (401, 402, 403, 404):
            raise ProviderError(f"{reason} ({_KEY_HELP.get(status, 'check the rights of the key')})") from None
        if isinstance(error, self._sdk.APIStatusError):
            return Failure(reason, is_final=status in (400, 413, 422))
        if isinstance(error, TypeError | ConfigError):
            raise error  # not an answer of the provider but a fault of the call
        # Cut-off JSON and broken streams reach us as exceptions of the libraries below the SDK.
        return Failure(reason)

    def _redact(self, text: str) -> str:
        return redact(text, self._client.api_key, self._client.auth_token)


def _refusal(message: Any) -> str:
    details = message.stop_details
    if message.stop_reason != "refusal":
        return ""
    category = (details.category if details is not None else None) or "no category"
    explanation = (details.explanation if details is not None else None) or ""
    return f"{category}: {explanation}" if explanation else category
