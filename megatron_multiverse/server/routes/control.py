"""Routes that steer the engine, in SGLang's shapes: pause, other weights, memory. Trainers call them between rollouts.

They need a key where the server has keys, like all others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from megatron_multiverse.server.body import Fields, check_others, log_ignored, read_fields
from megatron_multiverse.server.engine_client import EngineClient
from megatron_multiverse.server.errors import ApiError, refuse

router = APIRouter()

REGIONS: tuple[Literal["kv_cache", "weights"], ...] = ("kv_cache", "weights")
REFUSED: dict[str, tuple[Any, ...]] = {"is_async": (False,), "load_format": ("auto",), "manifest": ()}
"""Fields of /update_weights_from_disk that are not served, with the values that ask for nothing."""


class PauseFields(Fields):
    """Fields of /pause_generation."""

    mode: Literal["abort", "retract", "in_place"] = "abort"
    """abort ends all answers; in_place keeps them with their cache; retract keeps their text alone."""


class AbortFields(Fields):
    """Fields of /abort_request."""

    rid: str = ""
    abort_all: bool = False


class UpdateFields(Fields):
    """Fields of /update_weights_from_disk."""

    model_path: str
    weight_version: str | None = None
    abort_all_requests: bool = False
    flush_cache: bool = True
    keep_pause: bool = False


class MemoryFields(Fields):
    """Fields of /release_memory_occupation and /resume_memory_occupation."""

    tags: list[Literal["kv_cache", "weights"]] | None = None
    """None is both."""


def _client(request: Request) -> EngineClient:
    client: EngineClient = request.app.state.client
    return client


@router.post("/pause_generation")
async def pause_generation(request: Request) -> Response:
    """No step from now on; new requests wait."""
    fields = await read_fields(request, PauseFields, may_be_empty=True)
    await _client(request).act("pause", mode=fields.mode)
    return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})


@router.post("/continue_generation")
async def continue_generation(request: Request) -> Response:
    """Steps again."""
    await read_fields(request, Fields, may_be_empty=True)
    await _client(request).act("continue")
    return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})


@router.api_route("/flush_cache", methods=["GET", "POST"])
async def flush_cache(request: Request) -> Response:
    """Forget what was computed for prompts; status 400 while answers are in work."""
    await _client(request).act("flush")
    return PlainTextResponse("Cache flushed.\n")


@router.post("/abort_request")
async def abort_request(request: Request) -> Response:
    """End answers, which come back with finish_reason abort; unknown names are no error."""
    fields = await read_fields(request, AbortFields)
    client = _client(request)
    if fields.abort_all:
        client.cancel_all()
    elif fields.rid:
        client.abort(fields.rid)
    else:
        raise refuse("rid", "names no request; give one, or abort_all")
    return Response()


@router.post("/update_weights_from_disk")
async def update_weights_from_disk(request: Request) -> Response:
    """Go on with the weights of a checkpoint; answers in work go on from the text they have."""
    fields = await read_fields(request, UpdateFields)
    check_others(fields, REFUSED)
    log_ignored(fields)
    if not fields.flush_cache:
        raise refuse("flush_cache", "what other weights computed is never read again; leave it out")
    client = _client(request)
    folder = _checkpoint(request.app.state.config.weights_root, fields.model_path)
    waiting = client.num_generations
    options = {"version": fields.weight_version, "abort": fields.abort_all_requests, "keep_pause": fields.keep_pause}
    try:
        await client.act("update", folder=str(folder), **options)
    except ApiError as error:
        if error.status != 400:
            raise
        # The engine's own words name files, which are the operator's, and the one who asks is trusted with them.
        content = {"success": False, "message": error.message, "num_paused_requests": 0}
        return JSONResponse(content | error.body(), status_code=400)
    message = f"the weights are now {client.control.versions[-1]!r}"
    return JSONResponse({"success": True, "message": message, "num_paused_requests": waiting})


def _checkpoint(root: Path | None, path: str) -> Path:
    """The folder that a path names, absolute or below the root.

    Raises:
        ApiError: 403 where it leaves the root, links followed, or there is none; 400 where it is no folder.
    """
    if root is None:
        raise ApiError(403, "this server takes no weights; start it with --weights-root", code="weights_root")
    inside = root.resolve()
    try:
        folder = (inside / path).resolve()
        is_inside, is_there = folder.is_relative_to(inside), folder.is_dir()
    except (OSError, ValueError) as error:
        raise refuse("model_path", "is no path") from error
    if not is_inside:
        raise ApiError(
            403,
            "model_path: lies outside of --weights-root; name a checkpoint in it",
            param="model_path",
            code="outside",
        )
    if not is_there:
        raise refuse("model_path", "no such folder below --weights-root")
    return folder


@router.api_route("/release_memory_occupation", methods=["GET", "POST"])
async def release_memory_occupation(request: Request) -> Response:
    """Give back the memory of cache and weights; status 400 while answers are in work."""
    return await _memory(request, "release")


@router.api_route("/resume_memory_occupation", methods=["GET", "POST"])
async def resume_memory_occupation(request: Request) -> Response:
    """Take it again."""
    return await _memory(request, "resume")


async def _memory(request: Request, op: str) -> Response:
    fields = await read_fields(request, MemoryFields, may_be_empty=True)
    client = _client(request)
    await client.act(op, regions=list(REGIONS if fields.tags is None else fields.tags))
    return JSONResponse({"released": list(client.control.released)})
