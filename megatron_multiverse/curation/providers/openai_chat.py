"""Any server that speaks OpenAI's /v1/chat/completions, such as vLLM with an open model."""

from __future__ import annotations

from typing import Any

from megatron_multiverse.curation.exchange import Answer, Failure, Request, Stop, Usage
from megatron_multiverse.curation.providers.own_server import OwnServer
from megatron_multiverse.curation.providers.protocol import ProviderError, key_from, redact
from megatron_multiverse.errors import ConfigError

_STOPS: dict[str, Stop] = {"stop": "end", "length": "max_tokens", "content_filter": "refusal"}
_OWN_SERVER_KEY = "none"
"""The SDK wants a key; a server of one's own usually wants none."""


class OpenAIProvider:
    """See `protocol.Provider`.

    Args:
        model: name of the model, as the server lists it.
        base_url: address of the server, with /v1; default is the vendor's.
        concurrency: most requests on the wire at the same time.
        max_retries: how often the SDK tries again what passes by.
        timeout_s: longest wait for an answer.

    Raises:
        ConfigError: the package or the key is missing.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        concurrency: int = 16,
        max_retries: int = 6,
        timeout_s: float = 600.0,
    ) -> None:
        try:
            import httpx2
            import openai
        except ImportError as error:
            raise ConfigError("openai is not installed: pip install 'megatron-multiverse[curate]'") from error
        self._key = key_from("OPENAI_API_KEY")
        if self._key is None and base_url is None:
            raise ConfigError("no key for OpenAI: set OPENAI_API_KEY, or name a server of your own with --base-url")
        self.label = f"openai {model}"
        self.model = model
        self._sdk = openai
        self._server = OwnServer(base_url)
        self._client = openai.AsyncOpenAI(
            api_key=self._key or _OWN_SERVER_KEY,
            base_url=base_url,
            max_retries=max_retries,
            timeout=httpx2.Timeout(timeout_s, pool=None),  # waiting for a free connection is no fault
            http_client=openai.DefaultAioHttpClient(limits=httpx2.Limits(max_connections=concurrency)),
        )

    async def close(self) -> None:
        """See `Provider`."""
        await self._client.close()

    async def count_tokens(self, request: Request) -> None:
        """This protocol has no way to ask."""

    async def complete(self, request: Request) -> Answer | Failure:
        """See `Provider`."""
        options: dict[str, Any] = {}
        if request.schema is not None:
            schema = {"name": request.stage, "schema": request.schema, "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        messages: Any = [
            {"role": "system", "content": request.system},
            {"role": "user", "content": f"{request.shared}\n\n{request.task}"},
        ]
        options |= {"model": self.model, "max_completion_tokens": request.max_tokens, "messages": messages}
        try:
            completion: Any = await self._server.ask(lambda: self._client.chat.completions.create(**options))
        except Exception as error:
            return self._failure(error)
        return self._answer(completion)

    def _answer(self, completion: Any) -> Answer | Failure:
        if not isinstance(completion, self._sdk.types.chat.ChatCompletion) or not completion.choices:
            return Failure(f"the answer is no completion but {type(completion).__name__}")
        choice = completion.choices[0]
        refusal = choice.message.refusal or ""
        stop: Stop | None = "refusal" if refusal else _STOPS.get(choice.finish_reason)
        if stop is None:
            return Failure(f"the answer ended without a known reason ({choice.finish_reason})")
        return Answer(
            text=choice.message.content or "",
            stop=stop,
            model=str(completion.model),
            usage=_usage(completion.usage),
            refusal=refusal or ("content_filter" if stop == "refusal" else ""),
            raw=completion.to_dict(mode="json"),
        )

    def _failure(self, error: Exception) -> Failure:
        """As `AnthropicProvider._failure`.

        Raises:
            ProviderError: it would be the same for every request.
        """
        reason = redact(f"{type(error).__name__}: {error}", self._key)
        status = getattr(error, "status_code", None)
        if status in (401, 402, 403, 404):
            raise ProviderError(f"{reason} (check OPENAI_API_KEY, --base-url and --model)") from None
        if isinstance(error, TypeError):
            raise error  # not an answer of the server but a fault of the call
        return Failure(reason, is_final=status in (400, 413, 422))


def _usage(usage: Any) -> Usage:
    if usage is None:
        return Usage()
    prompt, output = usage.prompt_tokens_details, usage.completion_tokens_details
    cached = (prompt.cached_tokens or 0) if prompt is not None else 0
    thinking = (output.reasoning_tokens or 0) if output is not None else 0
    return Usage(usage.prompt_tokens - cached, 0, cached, usage.completion_tokens, thinking)
