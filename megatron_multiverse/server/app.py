"""The HTTP application: routes, and what holds for all of them."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time
import uuid
from collections.abc import Sequence

from fastapi import FastAPI
from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_multiverse.server.config import ServerConfig
from megatron_multiverse.server.engine_client import EngineClient
from megatron_multiverse.server.errors import ApiError
from megatron_multiverse.server.metrics import Metrics
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.routes import chat, completions, control, megatron, rollout, service, tokenizer, weights

logger = logging.getLogger(__name__)

ROUTERS = (
    megatron.router,
    completions.router,
    chat.router,
    tokenizer.router,
    rollout.router,
    control.router,
    weights.router,
    service.router,
)
PATHS = frozenset(route.path for router in ROUTERS for route in router.routes if isinstance(route, Route))
"""Of all routes."""

OPEN_PATHS = frozenset({"/", "/health", "/v1/health", "/health/live", "/health/ready", "/health_generate"})
"""They tell nothing of the model, and browsers and probes cannot send a key."""

SHOWN_CHARACTERS = 80
"""Of a path that an error shows."""


def build_app(config: ServerConfig, client: EngineClient, model: ServedModel, keys: Sequence[str]) -> FastAPI:
    """The application.

    Args:
        config: options of the server.
        client: the engine.
        model: tokenizer, names and templates.
        keys: those that open it; none lets everybody in who can reach the port.
    """
    app = FastAPI(
        title="Megatron-Multiverse",
        # No route takes part in FastAPI's schemas: bodies are read by `body.py`, so that every fault is one object.
        openapi_url=None,
        redirect_slashes=False,
        # It would hand texts of exceptions, which can hold prompts, to whatever collector is configured.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
        },
    )
    app.state.config, app.state.client, app.state.model = config, client, model
    app.state.metrics = metrics = Metrics(client)
    client.on_result = metrics.answered
    app.state.started, app.state.draining = int(time.time()), False
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(Gate, keys=keys, local_only=is_loopback(config.host), responses=metrics.responses)
    return app


class Gate:
    """Lets requests in: with a key, and from pages of this server only.

    A browser sends requests of any page to any address. So those that name another origin are refused, and, at a
    loopback address, those that reached it under a foreign name (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], local_only: bool, responses: Counter) -> None:
        self.app = app
        self._keys = [key.encode() for key in keys]
        self._local_only = local_only
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)  # lifespan; there are no websockets
            return

        started = False

        async def count(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                # The route is there once the request has been let in; its path may have a place for a name.
                path = getattr(scope.get("route"), "path", scope["path"])
                self._responses.labels(path if path in PATHS else "other", message["status"]).inc()
            await send(message)

        error = self._refusal(scope["path"], dict(scope["headers"]))
        answer = self.app if error is None else error_response(error)
        try:
            await answer(scope, receive, count)
        except Exception as fault:
            if started:
                raise  # the connection is cut
            await _internal_error(fault)(scope, receive, count)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        host, origin = headers.get(b"host", b""), headers.get(b"origin")
        if self._local_only and not _names_loopback(host.decode("latin-1")):
            return ApiError(403, "this server answers under a loopback name only, such as localhost", code="host")
        if origin is not None and origin.partition(b"://")[2] != host:
            return ApiError(403, "pages of other origins may not use this server", code="origin")
        if not self._keys or path in OPEN_PATHS:
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # Every key is compared, so that the time says nothing about which of them begins alike.
        matches = [hmac.compare_digest(key, given.strip()) for key in self._keys]
        if scheme.lower() == b"bearer" and any(matches):
            return None
        return ApiError(401, "missing or unknown key; send Authorization: Bearer KEY", code="invalid_api_key")


def is_loopback(host: str) -> bool:
    """Whether an address to listen at can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _names_loopback(host: str) -> bool:
    name = host[1 : host.index("]")] if host.startswith("[") and "]" in host else host.partition(":")[0]
    return is_loopback(name)


def error_response(error: ApiError) -> Response:
    """An error as a response."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    messages = {
        404: f"no route {request.url.path[:SHOWN_CHARACTERS]}; docs/serving.md lists them all",
        405: f"{request.method} is not what {request.url.path[:SHOWN_CHARACTERS]} takes",
    }
    headers = dict(error.headers or {})
    message = messages.get(error.status_code, "the request cannot be served")
    if error.status_code == 405 and "Allow" in headers:
        message += f"; it takes {headers['Allow']}"
    converted = ApiError(error.status_code, message)
    converted.headers |= headers
    return await _api_error(request, converted)


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this response."""
    return Response(status_code=499)


def _internal_error(error: Exception) -> Response:
    """Clients learn a number to ask for, never the text of an exception."""
    number = uuid.uuid4().hex[:12]
    logger.error("internal error %s", number, exc_info=error)
    return error_response(ApiError(500, f"internal error {number}; the log of the server says more"))
