"""The little of HTTP that all clients here need."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import httpx2

from megatron_multiverse.errors import ConfigError, GenerationError
from megatron_multiverse.patience import Deadline, Patience, Question

KEY_VARIABLE = "MULTIVERSE_API_KEY"


class ServerError(GenerationError):
    """A server refused a request, or broke off.

    Attributes:
        status: HTTP status; 0 for a stream that broke off.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def base_of(url: str) -> str:
    """The address of a server, without the /v1 that clients of OpenAI's write at its end.

    Raises:
        ConfigError: it has no http:// or https:// in front.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url}: begin it with http:// or https://, such as http://127.0.0.1:5000")
    return url.rstrip("/").removesuffix("/v1")


def connect(url: str, *, timeout: float = 600.0, most: int | None = None) -> httpx2.AsyncClient:
    """A client of a server, with the key of MULTIVERSE_API_KEY if that is set.

    Args:
        url: base of the server; a /v1 at its end is left out.
        timeout: seconds that the server may stay silent.
        most: connections at once; default: no limit.

    Raises:
        ConfigError: see `base_of`.
    """
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx2.AsyncClient(
        base_url=base_of(url), headers=headers, timeout=timeout, limits=httpx2.Limits(max_connections=most)
    )


async def post(client: httpx2.AsyncClient, path: str, body: dict[str, Any], question: Question | None = None) -> Any:
    """The JSON of an answer.

    Args:
        client: of the server.
        path: of the route.
        body: of the request.
        question: until when a server that starts or is busy is asked again; default is once.

    Raises:
        ServerError: the server refused, or cannot be reached.
        httpx2.HTTPError: it broke off.
    """
    if question is not None:
        return _json(await _patiently(client, path, question, body))
    with _told(client):
        return _json(await client.post(path, json=body))


async def get(client: httpx2.AsyncClient, path: str) -> Any:
    """What the server says of itself.

    Raises:
        ServerError, httpx2.HTTPError: see `post`.
    """
    with _told(client):
        return _json(await client.get(path))


def _json(response: httpx2.Response) -> Any:
    if response.status_code != 200:
        raise ServerError(response.status_code, error_text(response.status_code, response.text))
    return response.json()


async def served_model(client: httpx2.AsyncClient, name: str | None = None) -> str:
    """Wait for a server that starts, restarts or loads its model, and say what its model is called: the first question
    to any server.

    Args:
        client: of the server, of this project or any other with OpenAI's routes.
        name: what the user calls the model, if he does; the server is waited for all the same.

    Returns:
        `name`, or the first one of /v1/models.

    Raises:
        ServerError: it cannot be reached, its engine has died, it is not ready after `patience.PATIENCE_S` in all, or
            it names no model.
        httpx2.HTTPError: it broke off.
    """
    patience, deadline = Patience(str(client.base_url)), Deadline()
    models = await _patiently(client, "/v1/models", patience.question(deadline=deadline))
    # Others may have no such route. Ours says here alone that its engine has died.
    await _patiently(client, "/health/ready", patience.question({429, 503}, deadline))
    if name is not None:
        return name
    try:
        return str(_json(models)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ServerError(
            models.status_code, f"{client.base_url}: /v1/models names no model; is this the address of a server?"
        ) from error


async def _patiently(
    client: httpx2.AsyncClient, path: str, question: Question, body: dict[str, Any] | None = None
) -> httpx2.Response:
    """The answer that stands, of a GET or, with a body, of a POST."""
    while True:
        with _told(client):
            response = await (client.get(path) if body is None else client.post(path, json=body))
        status, text = response.status_code, "" if response.status_code == 200 else response.text
        said = f"{path} answers {error_text(status, text)}"
        pause = question.pause(status, text, said, response.headers.get("retry-after"))
        if pause is not None:
            await asyncio.sleep(pause)
        elif (given_up := question.given_up(status, text)) is not None:
            raise ServerError(status, f"{client.base_url}: {said}{given_up}")
        else:
            return response


async def stream(client: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[Any]:
    """The chunks of a stream, as they come.

    Raises:
        ServerError: the server cannot be reached, refused, sent an error, or ended without saying that it was done.
        httpx2.HTTPError: it broke off.
    """
    async with contextlib.AsyncExitStack() as stack:
        with _told(client):
            response = await stack.enter_async_context(client.stream("POST", path, json=body | {"stream": True}))
        if response.status_code != 200:
            raise ServerError(response.status_code, error_text(response.status_code, (await response.aread()).decode()))
        async with contextlib.aclosing(_lines(response)) as lines:
            async for line in lines:
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise ServerError(0, error_text(0, line[6:]))
                    yield chunk
    raise ServerError(0, "the stream ended without [DONE]")


async def _lines(response: httpx2.Response) -> AsyncGenerator[str, None]:
    """The lines of a stream. `aiter_lines` would end them at characters such as U+2028, too, which JSON leaves as they
    are, and answers hold."""
    rest = ""
    async for text in response.aiter_text():
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line.removesuffix("\r")


@contextlib.contextmanager
def _told(client: httpx2.AsyncClient) -> Iterator[None]:
    try:
        yield
    except httpx2.ConnectError as error:
        raise ServerError(
            0, f"no server answers at {client.base_url}; start one, or name another with --url"
        ) from error


def error_text(status: int, text: str) -> str:
    """What an error says, whatever its shape."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(text)["error"]["message"])
    return f"status {status}: {text[:200]}"
