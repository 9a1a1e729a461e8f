"""Building configuration dataclasses from nested mappings (JSON files, dictionaries), strictly."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from megatron_multiverse.errors import ConfigError

T = TypeVar("T")


def check(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check_choices(config: Any, where: str) -> None:
    """Raise ConfigError unless every field of a dataclass that is a Literal (or None) holds one of its values.

    Python does not look at annotations, and dataclasses are also built directly.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
        if literals:
            allowed = [value for part in literals for value in typing.get_args(part)]
            allowed += [None] if type(None) in parts else []
            value = getattr(config, name)
            shown = ", ".join(map(str, allowed))
            check(value in allowed, f"{where}{name} is {value!r}, allowed: {shown}")


def check_finite(config: Any, where: str) -> None:
    """Raise ConfigError if a number of a dataclass is infinite or not a number; YAML reads .inf and .nan as such."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        check(not isinstance(value, float) or math.isfinite(value), f"{where}{field.name} must be finite, got {value}")


def dataclass_from_mapping(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Build a (nested) dataclass; every key must be a field and every value must fit its type.

    Args:
        cls: a dataclass type.
        values: nested mapping of field names.
        where: dotted path of `values`, for messages.

    Raises:
        ConfigError: unknown, missing or mistyped key.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping for {cls.__name__}, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(fields)}"
            raise ConfigError(f"{where}.{key}: unknown key; {hint}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}.{name}: required and missing")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _coerce(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the annotated type, converting only what JSON may write otherwise: tuples and whole floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is typing.Literal:
        check(value in args, f"{where}: got {value!r}, allowed: {', '.join(map(str, args))}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else dataclass_from_mapping(hint, value, where=where)
    if origin is tuple:
        check(isinstance(value, (list, tuple)), f"{where}: expected a list, got {value!r}")
        return tuple(_coerce(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    check(type(value) is hint, f"{where}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
    return value
