"""What a server is asked about itself: its models, its health, its metrics, its page."""

from __future__ import annotations

import asyncio
from importlib import resources
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from megatron_multiverse.server.errors import unavailable

router = APIRouter()


@router.get("/health/live")
async def live() -> Response:
    """The HTTP process answers. Whether the engine does: /health/ready."""
    return JSONResponse({"status": "live"})


@router.get("/health/ready")
@router.get("/health")
@router.get("/v1/health")
@router.get("/health_generate")
async def ready(request: Request) -> Response:
    """Whether requests are taken and the engine has given a sign of life."""
    state = request.app.state
    condition = "draining" if state.draining else state.client.condition
    if condition != "ready":
        raise unavailable(condition)
    return JSONResponse({"status": "ready", "ready": True})


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model that is served."""
    return JSONResponse({"object": "list", "data": [_model(request)]})


@router.get("/v1/models/{name:path}")
async def one_model(request: Request, name: str) -> Response:
    """The same by its name, which may hold slashes."""
    request.app.state.model.check_name(name)
    return JSONResponse(_model(request))


def _model(request: Request) -> dict[str, Any]:
    state = request.app.state
    return {
        "id": state.model.name,
        "object": "model",
        "created": state.started,
        "owned_by": "megatron-multiverse",
        "max_model_len": state.client.facts.get("max_position"),
    }


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text. Made in a thread, so that a scrape holds up no stream."""
    text = await asyncio.to_thread(generate_latest, request.app.state.metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/")
async def page() -> Response:
    """The page that shows branches growing side by side."""
    headers = {
        # The page holds all it needs; a browser need not fetch, and must not run, anything else.
        "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "x-content-type-options": "nosniff",
    }
    text = resources.files("megatron_multiverse.server").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers=headers)
