"""Command lines from dataclasses: fields are flags, attribute docstrings are their help."""

from __future__ import annotations

import dataclasses
import json
import keyword
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def parse_options(cls: type[T], args: Sequence[str] | None = None) -> T:
    """Options of the running script: an instance of the dataclass `cls`.

    Flags may be written as Megatron does: with hyphens (``--num-rows``) or underscores, switches without a value
    (``--append-eod``), lists as several words (``--json-keys prompt response``), fields of a nested dataclass after a
    dot (``--sampling.top-k 5``). Wrong flags and values end the script with a message.

    Args:
        cls: a dataclass whose fields are the flags.
        args: the command line; default `sys.argv[1:]`.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    class Parser(ArgumentParser):
        """Shows flags the way they are written: `--num-rows`, `--from`."""

        def format_help(self, *args: Any, **kwargs: Any) -> str:
            return _hyphenated(str(super().format_help(*args, **kwargs)))

        def format_usage(self) -> str:
            return _hyphenated(str(super().format_usage()))

    # Not auto_cli: it would offer the methods of `cls` as subcommands.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser()
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_class_arguments(cls)
    given = [_underscored(argument) for argument in (sys.argv[1:] if args is None else args)]
    values = parser.instantiate_classes(parser.parse_args(_with_values(cls, given)))
    return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _hyphenated(text: str) -> str:
    return re.sub(r"--[a-z][a-z0-9_.]*", lambda flag: "--" + flag.group()[2:].rstrip("_").replace("_", "-"), text)


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    name = flag[2:].replace("-", "_")
    # A field cannot have the name of a Python keyword: --from is the field from_.
    return "--" + name + "_" * keyword.iskeyword(name) + equals + value


def _with_values(cls: type[Any], args: list[str]) -> list[str]:
    """Give bare switches their value and gather the words after a list flag into one YAML list."""
    kinds = _kinds(cls, "--")
    result: list[str] = []
    position = 0
    while position < len(args):
        flag = args[position]
        end = position + 1
        while end < len(args) and not args[end].startswith("--"):
            end += 1
        words = args[position + 1 : end]
        kind = kinds.get(flag, "")
        if kind.endswith("bool") and not words:
            result.append(f"{flag}=true")
        elif kind.startswith(("list[", "tuple[")) and words and not words[0].startswith("["):
            result.append(f"{flag}={json.dumps(words)}")
        else:
            result += [flag, *words]
        position = end
    return result


def _kinds(cls: type[Any], prefix: str) -> dict[str, str]:
    """Flag to annotation, the flags of nested dataclasses (``--sampling.top_k``) included."""
    kinds = {f"{prefix}{field.name}": str(field.type) for field in dataclasses.fields(cls)}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            kinds |= _kinds(hint, f"{prefix}{name}.")
    return kinds
