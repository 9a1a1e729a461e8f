"""Request bodies: bytes to JSON to fields, each fault with the name of what is wrong."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from megatron_multiverse.server.config import LimitConfig
from megatron_multiverse.server.errors import ApiError
from megatron_multiverse.server.garbage import no_collections
from megatron_multiverse.server.refused import ALIKE, ELSEWHERE, Refused

logger = logging.getLogger(__name__)

SHOWN_CHARACTERS = 80
"""Of a value that is refused."""

_TYPE_NAMES = {"str", "int", "float", "bool"}


class Fields(BaseModel):
    """Fields of a request. Types are strict: a text or a bool is no number. Others are kept for `check_others`."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


F = TypeVar("F", bound=Fields)


async def read_fields(request: Request, fields: type[F], *, may_be_empty: bool = False) -> F:
    """The fields of a request's body, which is JSON whatever its content type says: `curl -d` says it is a form.

    Args:
        request: with its body.
        fields: what it may hold.
        may_be_empty: whether no body at all is an object without fields.

    Raises:
        ApiError: 400 for what is no JSON object, for a wrong field and for a text that is no Unicode; 408 and 413.
    """
    body = await read_body(request, request.app.state.config.limits)
    return read_object(b"{}" if may_be_empty and not body else body, fields)


def read_object(body: bytes, fields: type[F]) -> F:
    """The fields of a JSON object.

    Raises:
        ApiError: 400, see `read_fields`.
    """
    with no_collections():
        data = parse_json(body)
        if not isinstance(data, dict):
            raise ApiError(400, f"the body must be a JSON object, got {_kind(data)}", code="invalid_json")
        try:
            return fields.model_validate(data)
        except ValidationError as error:
            raise _first_fault(error) from error


async def read_body(request: Request, limits: LimitConfig) -> bytes:
    """The body of a request.

    Raises:
        ApiError: 413 if it is larger than `limits.max_body_bytes`, 408 if it does not arrive in time.
        ClientDisconnect: the client went away.
    """
    length = request.headers.get("content-length", "")
    body = bytearray()
    try:
        if length.isdecimal() and int(length[:20]) > limits.max_body_bytes:
            raise _too_large(limits.max_body_bytes)
        async with asyncio.timeout(limits.body_timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_body_bytes:
                    raise _too_large(limits.max_body_bytes)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {limits.body_timeout:g} seconds") from error
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """JSON as the standard has it: no NaN, no Infinity, UTF-8 only, at most 200 deep.

    By pydantic's parser, since all streams wait while a body is read: no parser lets other threads run meanwhile, and
    this one is faster than Python's (benchmarks/server/bodies.py). Nor does it take a lone half of a surrogate
    pair, which is JSON but no Unicode: tokenizers and answers could not hold it.

    Raises:
        ApiError: it is none.
    """
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise _json_fault(body, str(error)) from error


def check_others(fields: Fields, refused: Refused, hint: str = "") -> None:
    """Refuse fields that clients of this route know and the server does not have.

    Args:
        fields: of the request.
        refused: name -> values that ask for nothing, and so are taken.
        hint: what to do instead.

    Raises:
        ApiError: 400, naming the first.
    """
    for name, value in (fields.model_extra or {}).items():
        if name in refused and _asks(value, refused[name]):
            allowed = " or ".join(json.dumps(neutral) for neutral in refused[name])
            instead = f"leave it out{f', or give {allowed}' if allowed else ''}{hint}"
            raise _unsupported(name, value, "not supported by this server", instead)


def check_elsewhere(fields: Fields, inner: tuple[str, type[Fields]] | None = None) -> None:
    """Refuse fields that only other routes of this server take: the answer would be another one than asked for. Called
    after `check_others`, since what neither of them refuses is ignored, which the log is told.

    Args:
        fields: of the request.
        inner: name and fields of an object of the request that takes some of them.

    Raises:
        ApiError: 400, naming the first, and what this route has in its place.
    """
    own = type(fields)
    for name, value in (fields.model_extra or {}).items():
        if name not in ELSEWHERE or not _asks(value, ELSEWHERE[name]):
            continue
        names = (name, *ALIKE.get(name, ()))
        if any(_is_same(getattr(fields, other), value) for other in names if other in own.model_fields):
            continue  # clients that know several names give them all
        known = [(_takes(own, other, value), other) for other in names if other in own.model_fields]
        if inner is not None:
            place, kind = inner
            known += [(_takes(kind, other, value), f"{place}.{other}") for other in names if other in kind.model_fields]
        # The first that takes such a value; else the first that asks for the like in another way.
        best = min(known, key=lambda one: not one[0], default=None)
        instead = "leave it out" if best is None else f"it has {best[1]}"
        raise _unsupported(name, value, "no field of this route", instead)
    log_ignored(fields)


def log_ignored(fields: Fields) -> None:
    """Tell the log of the fields of a request that nothing has refused and nothing reads."""
    for name in fields.model_extra or {}:
        logger.debug("field %r of a request is ignored", name[:SHOWN_CHARACTERS])


def _unsupported(name: str, value: Any, reason: str, instead: str) -> ApiError:
    message = f"{name}: {reason} (got {_shown(value)}); {instead}"
    return ApiError(400, message, param=name, code="unsupported_parameter")


def _asks(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a field asks for anything."""
    return value is not None and not any(_is_same(value, one) for one in neutral)


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values say the same. To Python true is 1, but it is no number of alternatives."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _takes(kind: type[Fields], name: str, value: Any) -> bool:
    """Whether a field takes a value of such a type."""
    try:
        kind.__pydantic_validator__.validate_assignment(kind.model_construct(), name, value)
    except ValidationError:
        return False
    return True


def _json_fault(body: bytes, fault: str) -> ApiError:
    """The error for a body that the parser refused with these words, which name the place."""
    try:
        body.decode("utf-8")
        is_unicode = "surrogate" not in fault and "hex escape" not in fault
    except UnicodeDecodeError:
        is_unicode = False
    if not is_unicode:
        return ApiError(400, "the body is not UTF-8, or holds half of a character (\\ud800 to \\udfff)")
    is_too_large = "recursion limit" in fault or "out of range" in fault
    said = " for this server: its numbers or its nesting are too large" if is_too_large else f": {fault}"
    return ApiError(400, f"the body is no JSON{said}", code="invalid_json")


def _first_fault(error: ValidationError) -> ApiError:
    """The first wrong field. Of several types it may have, each tells a fault; those deepest in it count, and of them
    the last: the type that fits furthest is the one that was meant."""
    faults = error.errors(include_url=False)
    name = faults[0]["loc"][:1]
    deepest = max((fault for fault in faults if fault["loc"][:1] == name), key=lambda fault: _depth(fault["loc"]))
    place = _place(deepest["loc"])
    told = dict.fromkeys(_told(fault) for fault in faults if _place(fault["loc"]) == place)
    message = f"{'.'.join(place)}: {' or '.join(told).replace(' or Input should be', ' or')}"
    if deepest["type"] != "missing":
        message = f"{message} (got {_shown(deepest['input'])})"
    return ApiError(400, message, param=str(name[0]) if name else None, code="invalid_value")


def _depth(loc: tuple[int | str, ...]) -> tuple[int, list[int]]:
    """Orders faults by how deep in the field they are, and how far along."""
    return len(_place(loc)), [part for part in loc if isinstance(part, int)]


def _place(loc: tuple[int | str, ...]) -> list[str]:
    """Where in the body a fault is, without the names of the types that a field may have."""
    return [str(part) for part in loc if not (isinstance(part, str) and ("[" in part or part in _TYPE_NAMES))]


def _told(fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        return "no such field; docs/serving.md lists them"
    return "Input should be an object" if fault["type"] in ("model_type", "dict_type") else str(fault["msg"])


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (ValueError, RecursionError):
        text = _kind(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes; send less at once", code="body_too_large")
