"""No option is accepted and then forgotten: every one that a tool lists is read somewhere."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import sys
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*ROOT.glob("tools/*.py"), *ROOT.glob("tools/dev/*.py"), *ROOT.glob("pretrain_scripts/*.py")]
SCRIPTS += ROOT.glob("examples/quickstart/*.py")
CODE = ["megatron_multiverse", "kernels", "tools", "pretrain_scripts", "examples", "benchmarks"]


def options_of(script: Path) -> str | None:
    """The name of the dataclass whose fields are the flags of a script."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "parse_options":
            assert isinstance(node.args[0], ast.Name)
            return node.args[0].id
    return None


TOOLS = {str(script.relative_to(ROOT)): name for script in sorted(SCRIPTS) if (name := options_of(script))}


@cache
def read_names() -> frozenset[str]:
    """All attributes that are read in the code."""
    names = set()
    for folder in CODE:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    names.add(node.attr)
    return frozenset(names)


def fields(kind: Any) -> Iterator[str]:
    """Names of the fields of a dataclass, those of the dataclasses in it included."""
    for field in dataclasses.fields(kind):
        yield field.name
        hint = typing.get_type_hints(kind)[field.name]
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from fields(inner)


def options_class(script: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The dataclass that a script imports by this name, perhaps within a function, or defines itself."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and name in [alias.name for alias in node.names]:
            return getattr(importlib.import_module(node.module), name)
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    spec = importlib.util.spec_from_file_location(f"options_of_{script.stem}", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return getattr(module, name)


@pytest.mark.parametrize("tool", TOOLS)
def test_every_option_of_a_tool_is_read_somewhere(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set(fields(options_class(ROOT / tool, TOOLS[tool], monkeypatch)))
    unread = sorted(names - read_names())
    assert names and not unread, f"{tool} accepts options that nothing reads: {', '.join(unread)}"


def test_all_tools_are_looked_at() -> None:
    assert len([tool for tool in TOOLS if tool.startswith("tools/")]) >= 14
