"""Whether a JSON value is of a type of the vendor's SDK: the server of the tests refuses what the API would refuse."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NotRequired, Required

from typing_extensions import is_typeddict


def check_type(value: Any, kind: Any, place: str) -> str | None:
    """Why the value is not of this type of the SDK; None if it is."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or kind is object:
        return None
    if origin in (Required, NotRequired, typing.Required, typing.Annotated):
        return check_type(value, arguments[0], place)
    if origin is typing.Literal:
        return None if value in arguments else f"{place}: {value!r} is none of {arguments}"
    if origin in (typing.Union, type(int | None)):
        reasons = [check_type(value, argument, place) for argument in arguments]
        return None if None in reasons else reasons[0]
    if is_typeddict(kind):
        return _check_dict(value, kind, place)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return None if isinstance(value, dict) else f"{place}: an object is expected"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        if not isinstance(value, list):
            return f"{place}: a list is expected"
        items = (check_type(item, arguments[0], f"{place}.{k}") for k, item in enumerate(value))
        return next((reason for reason in items if reason), None)
    if kind is type(None):
        return None if value is None else f"{place}: null is expected"
    if isinstance(kind, type):
        is_right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        return None if is_right else f"{place}: {kind.__name__} is expected"
    return None


def _check_dict(value: Any, kind: Any, place: str) -> str | None:
    if not isinstance(value, dict):
        return f"{place}: an object is expected"
    hints = _hints(kind)
    if unknown := value.keys() - hints.keys():
        return f"{place}: unknown key {sorted(unknown)[0]}"
    if missing := {name for name, hint in hints.items() if _is_required(hint)} - value.keys():
        return f"{place}: {sorted(missing)[0]} is missing"
    reasons = (check_type(item, hints[name], f"{place}.{name}") for name, item in value.items())
    return next((reason for reason in reasons if reason), None)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _is_required(hint: Any) -> bool:
    return typing.get_origin(hint) in (Required, typing.Required)
