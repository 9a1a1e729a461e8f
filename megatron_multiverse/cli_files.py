"""YAML files on a command line, held against the dataclass that they fill, before jsonargparse reads them.

jsonargparse refuses wrong files too, but names neither the file nor the setting that may have been meant.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any

import yaml

from megatron_multiverse.errors import ConfigError

_OF_EVERY_TOOL = ("config", "debug")
_RL, _SFT = "pretrain_scripts/rl_multiverse.py", "pretrain_scripts/sft_multiverse.py"
_OF_ANOTHER_RUN = {"task": _RL, "reward": _RL, "rollout": _RL, "policy": _RL, "data": _SFT, "model": _SFT}
"""Sections that one of the training scripts has alone, whose files are taken for those of the other."""


def part_of(hint: Any) -> type[Any] | None:
    """The dataclass among the types that a field may have."""
    types = (part for part in (hint, *typing.get_args(hint)) if isinstance(part, type))
    return next((part for part in types if dataclasses.is_dataclass(part)), None)


def refuse_wrong_file(cls: type[Any], file: Path) -> None:
    """Refuse a YAML file that does not fill the dataclass `cls`; of the values, jsonargparse says whether they fit.

    Raises:
        ConfigError: no YAML, nothing in it, or a key that is unknown, stands twice, also beside its section, or has
            nothing below it.
    """
    with open(file, encoding="utf-8", errors="replace") as stream:
        try:
            values = yaml.load(stream, Loader=_UniqueKeys)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise ConfigError(f"{file}{place}: no YAML ({error.problem}); mend it") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{file}: no YAML ({error}); mend it") from error
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise ConfigError(f"{file} {found}: write settings into it, a line `name: value` for each")
    _refuse_keys(cls, cls, values, f"{file}: ", "")
    if len(values) == 1 and None in values.values():  # jsonargparse takes such a file for a text
        raise ConfigError(f"{file}: nothing stands beside {next(iter(values))}: write its settings there, or remove it")


def refuse_unknown_part_keys(cls: type[Any], values: Any, where: str = "") -> None:
    """Refuse unknown keys of optional parts, of which jsonargparse says only that no type of a union fits.

    Args:
        cls: the dataclass.
        values: nested mapping of its fields, as a flag with dots names them.
        where: for messages.

    Raises:
        ConfigError: an unknown key.
    """
    hints = typing.get_type_hints(cls)
    for name, inner in values.items() if isinstance(values, dict) else ():
        part = part_of(hints.get(name))
        if part is None or not isinstance(inner, dict):
            continue
        if part is not hints[name]:
            for key in inner:
                _refuse_key(part, part, str(key), f"{where}{name} has no setting", "")
        refuse_unknown_part_keys(part, inner, f"{where}{name}.")


def _refuse_keys(whole: type[Any], cls: type[Any], values: dict[Any, Any], where: str, section: str) -> None:
    hints = typing.get_type_hints(cls)
    no_setting = f"{where}{section[:-1]} has no setting" if section else f"{where}no setting is called"
    for key, inner in values.items():
        name = str(key)
        if not section and name in _OF_EVERY_TOOL:
            continue
        _refuse_key(whole, cls, name, no_setting, section)
        head = name.partition(".")[0]
        if head != name and head in values:  # jsonargparse lets the later of them replace what the earlier one set
            raise ConfigError(f"{where}{section}{name} and {section}{head} stand side by side: write it below {head}")
        part = part_of(hints.get(name))  # none where the key has dots: jsonargparse takes it apart
        if part is None:
            continue
        if isinstance(inner, dict):
            _refuse_keys(whole, part, inner, where, f"{section}{name}.")
        elif inner is None and part is hints[name]:
            raise ConfigError(f"{where}nothing stands below {section}{name}: write its settings there, or remove it")


def _refuse_key(whole: type[Any], cls: type[Any], key: str, no_setting: str, section: str) -> None:
    """Refuse `key` unless `cls` has it: with its place where it stands elsewhere in `whole`, else the nearest name."""
    allowed = [field.name for field in dataclasses.fields(cls)]
    if key.split(".")[0] in allowed:
        return
    elsewhere = [path for path in _paths(whole) if path.rpartition(".")[2] == key]
    close = difflib.get_close_matches(key, allowed, n=1) or elsewhere
    close = close or [path for path in _paths(whole) if path.rpartition(".")[2] in _near(key, whole)]
    hint = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(allowed)}"
    if whole is cls and key in _OF_ANOTHER_RUN and {"init_from", "train_iters"} <= {*allowed}:
        hint = f"it is one of {_OF_ANOTHER_RUN[key]}, for whose runs this file seems to be meant"
    raise ConfigError(f"{no_setting} {key!r}; {hint}")


def _near(key: str, whole: type[Any]) -> list[str]:
    return difflib.get_close_matches(key, [path.rpartition(".")[2] for path in _paths(whole)], n=1, cutoff=0.75)


def _paths(cls: type[Any], prefix: str = "") -> list[str]:
    """All settings with the sections that they stand in: `optim.lr`."""
    paths = []
    for name, hint in typing.get_type_hints(cls).items():
        part = part_of(hint)
        paths += _paths(part, f"{prefix}{name}.") if part else [f"{prefix}{name}"]
    return paths


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping: YAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ConfigError(
                    f"{self.name}, line {line}: {key.value!r} stands twice, first in line {seen[key.value]}: remove one"
                )
            seen[key.value] = line
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping
