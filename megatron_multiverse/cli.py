"""Command lines from dataclasses: fields are flags, attribute docstrings are their help."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def parse_options(cls: type[T], args: Sequence[str] | None = None) -> T:
    """Options of the running script: an instance of the dataclass `cls`.

    Flags may be written with hyphens, as Megatron does (``--num-rows``), or underscores. Wrong flags and
    values end the script with a message.

    Args:
        cls: a dataclass whose fields are the flags.
        args: the command line; default `sys.argv[1:]`.
    """
    from jsonargparse import auto_cli, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    given = sys.argv[1:] if args is None else args
    result: Any = auto_cli(cls, args=[_underscored(argument) for argument in given], as_positional=False)
    return result  # type: ignore[no-any-return]


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
