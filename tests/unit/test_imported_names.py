"""Everything that is imported from this package exists in it, also where only a machine with a GPU would find out.

Tests of kernels, and the kernels themselves, are not imported without a GPU, and mypy does not see kernels/ under the
name by which it is imported (`package_dir` in setup.py).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.unit.test_imports import MODULES, ROOT, source_of

FOLDERS = ("megatron_multiverse", "kernels", "pretrain_scripts", "tools", "examples", "benchmarks", "tests")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those that run when a module is imported, also inside of `if`, `try` and `with`."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for block in ("body", "orelse", "handlers", "finalbody"):
                inner = getattr(node, block, [])
                for part in inner:
                    yield from statements(part.body if isinstance(part, ast.ExceptHandler) else [part])


@cache
def names_of(path: Path) -> set[str]:
    """What a module has after its import."""
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        else:
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


def missing_names(path: Path, code: str) -> list[str]:
    """What this code imports from the package although it does not exist."""
    missing = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            missing += [alias.name for alias in node.names if is_ours(alias.name) and alias.name not in MODULES]
        elif isinstance(node, ast.ImportFrom) and is_ours(source := source_of(node, path)):
            names = names_of(MODULES[source]) if source in MODULES else set()
            missing += [
                f"{source}.{alias.name}"
                for alias in node.names
                if alias.name not in names and f"{source}.{alias.name}" not in MODULES
            ]
    return missing


def is_ours(module: str) -> bool:
    return module.split(".")[0] == "megatron_multiverse"


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("from megatron_multiverse.kernels.structure_scan import structure_scan", []),
        ("from megatron_multiverse.kernels import structure_scan", []),
        ("def f():\n    from megatron_multiverse.kernels.rope import gone", ["megatron_multiverse.kernels.rope.gone"]),
        ("from megatron_multiverse.kernels.gone import x", ["megatron_multiverse.kernels.gone.x"]),
        ("import megatron_multiverse.gone", ["megatron_multiverse.gone"]),
    ],
)
def test_a_name_that_does_not_exist_is_found(code: str, missing: list[str]) -> None:
    assert missing_names(ROOT / "tests" / "x.py", code) == missing


def test_all_that_is_imported_exists() -> None:
    assert {path for path in FILES if path.is_relative_to(ROOT / "tests" / "gpu")}
    missing = {str(path.relative_to(ROOT)): missing_names(path, path.read_text(encoding="utf-8")) for path in FILES}
    assert not {path: names for path, names in missing.items() if names}
