"""Routes by which a trainer sends weights over a process group, in SGLang's shapes.

They need a key where the server has keys. The engine connects to the address that is asked for, so it has to be allowed
with --weights-interface.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megatron_multiverse.server.body import Fields, check_others, log_ignored, read_fields
from megatron_multiverse.server.engine_client import EngineClient
from megatron_multiverse.server.errors import ApiError, refuse

router = APIRouter()

CHECK_REFUSED: dict[str, tuple[Any, ...]] = {
    "allow_quant_error": (False,),  # what an engine rounds it rounds alike, so nothing has to be allowed
    "selector": ("all", "target"),
    "skip_tensor_list": ([],),  # by SGLang's names of tensors
}
"""Fields of /weights_checker that are not served, with the values that ask for nothing."""
GROUP = "weight_update_group"
Name = Annotated[str, Field(min_length=1, max_length=256)]
Size = Annotated[int, Field(ge=1, le=2**48)]


class GroupFields(Fields):
    """Fields of /destroy_weights_update_group."""

    group_name: Name = GROUP


class JoinFields(GroupFields):
    """Fields of /init_weights_update_group."""

    master_address: Name
    master_port: Annotated[int, Field(ge=1, lt=2**16)]
    rank_offset: int
    world_size: Annotated[int, Field(le=2**20)]
    backend: Literal["nccl", "gloo"] = "nccl"


class ReceiveFields(GroupFields):
    """Fields of /update_weights_from_distributed."""

    names: list[str]
    """Hugging Face's."""
    dtypes: list[str]
    """torch's names, with or without "torch."."""
    shapes: list[list[Size]]
    flush_cache: bool = True
    """Trainers that have flushed it say false. What other weights computed is never read again, whatever it says."""
    abort_all_requests: bool = False
    weight_version: str | None = None
    load_format: Literal["auto", "flattened_bucket"] | None = None
    """flattened_bucket: the bytes of all tensors, one after the other, as one tensor."""


class CheckFields(Fields):
    """Fields of /weights_checker."""

    action: Literal["snapshot", "reset_tensors", "compare"]
    """snapshot notes the weights, reset_tensors makes random numbers of them, compare says whether they are as
    noted."""


class VersionFields(Fields):
    """Fields of /update_weight_version."""

    new_version: str
    abort_all_requests: bool = True


@router.post("/init_weights_update_group")
async def init_weights_update_group(request: Request) -> Response:
    """Join a trainer's group, over which it will send weights."""
    fields = await read_fields(request, JoinFields)
    config = request.app.state.config
    if config.weights_interface is None:
        raise ApiError(403, "this server joins no group; start it with --weights-interface", code="weights_interface")
    options = {
        "name": fields.group_name,
        "address": fields.master_address,
        "port": fields.master_port,
        "rank_offset": fields.rank_offset,
        "size": fields.world_size,
        "backend": fields.backend,
        "interface": config.weights_interface,
        "seconds": config.limits.weights_timeout,
    }
    return await _act(request, f"joined {fields.group_name!r}", "join", options=options)


@router.post("/destroy_weights_update_group")
async def destroy_weights_update_group(request: Request) -> Response:
    """Leave a trainer's group."""
    fields = await read_fields(request, GroupFields, may_be_empty=True)
    return await _act(request, f"left {fields.group_name!r}", "leave", options={"name": fields.group_name})


@router.post("/update_weights_from_distributed")
async def update_weights_from_distributed(request: Request) -> Response:
    """Receive tensors from rank 0 of a group and go on with them; answers in work go on from the text they have."""
    fields = await read_fields(request, ReceiveFields)
    check_others(fields, {"manifest": ()})
    log_ignored(fields)
    if not fields.names or not len(fields.names) == len(fields.dtypes) == len(fields.shapes):
        counts = f"{len(fields.names)} names, {len(fields.dtypes)} dtypes and {len(fields.shapes)} shapes"
        raise refuse("names", f"there are {counts}; give one of each for every tensor")
    dtypes = [dtype.removeprefix("torch.") for dtype in fields.dtypes]
    options = {
        "name": fields.group_name,
        "tensors": list(zip(fields.names, dtypes, fields.shapes, strict=True)),
        "version": fields.weight_version,
        "flattened": fields.load_format == "flattened_bucket",
        "seconds": request.app.state.config.limits.weights_timeout,
    }
    received = f"received {len(fields.names)} tensors"
    return await _act(request, received, "receive", options=options, abort=fields.abort_all_requests)


@router.post("/weights_checker")
async def weights_checker(request: Request) -> Response:
    """Find out whether weights that a trainer sends arrive: on all ranks, to the bit."""
    fields = await read_fields(request, CheckFields)
    check_others(fields, CHECK_REFUSED)
    log_ignored(fields)
    config = request.app.state.config
    if config.weights_root is None and config.weights_interface is None:
        raise ApiError(
            403, "this server takes no weights; start it with --weights-root or --weights-interface", code="weights"
        )
    done = {"snapshot": "noted", "reset_tensors": "made random", "compare": "compared: all tensors are as noted"}
    return await _act(request, done[fields.action], "check", options={"action": fields.action})


@router.post("/update_weight_version")
async def update_weight_version(request: Request) -> Response:
    """Call the weights that are in use by another name."""
    fields = await read_fields(request, VersionFields)
    options, more = {"version": fields.new_version}, {"new_version": fields.new_version}
    return await _act(request, "renamed", "rename", options=options, abort=fields.abort_all_requests, more=more)


async def _act(request: Request, done: str, op: str, *, more: dict[str, Any] | None = None, **fields: Any) -> Response:
    """Let the engine do it; whether that went well is in `success`, as SGLang's clients read it."""
    client: EngineClient = request.app.state.client
    try:
        await client.act(op, **fields)
    except ApiError as error:
        if error.status != 400:
            raise
        return JSONResponse({"success": False, "message": error.message} | error.body(), status_code=400)
    message = f"{done}; the weights are {client.control.versions[-1]!r}"
    if incomplete := client.control.incomplete:
        message += (
            f"; {len(incomplete)} tensors, e.g. {incomplete[0]}, are used once the others of their matrix have come"
        )
    return JSONResponse({"success": True, "message": message} | (more or {}))
