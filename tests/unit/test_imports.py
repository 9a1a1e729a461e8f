"""Imports go one way, light parts stay light, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_multiverse"

# Which parts each part may import. import-linter checks the package too, but it does not see kernels/ behind
# package_dir, and it does not know examples/ and tools/.
ALLOWED = {
    "errors": set(),
    "cli": set(),
    "config": {"errors"},
    "files": set(),
    "structure": {"errors"},
    "kernels": {"errors", "structure"},
    "data": {"errors", "config", "files", "structure", "cli"},
    "model": {"errors", "config", "files", "structure", "kernels"},
    "checkpoints": {"errors", "config", "files", "structure", "kernels", "data", "model"},
    "training": {"errors", "config", "files", "structure", "kernels", "data", "model", "checkpoints"},
    "inference": {"errors", "config", "files", "structure", "kernels", "data", "model", "checkpoints"},
    "views": {"errors", "config", "files", "structure", "data", "model", "inference"},
}
NO_TORCH = {"errors", "config", "files", "structure"}


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {f"{source_of(node, path)}.{alias.name}" for alias in node.names}
    return modules


def source_of(node: ast.ImportFrom, path: Path) -> str:
    """The full name of the module that a `from ... import` reads, dots in front resolved."""
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).parts[:-1]
    if package[:1] == ("kernels",):
        package = ("megatron_multiverse", *package)
    kept = package[: len(package) - node.level + 1]
    return ".".join((*kept, *(node.module or "").split("."))).rstrip(".")


def files_of(part: str) -> list[Path]:
    if part == "kernels":
        return sorted((ROOT / "kernels").rglob("*.py"))
    single = PACKAGE / f"{part}.py"
    return [single] if single.exists() else sorted((PACKAGE / part).rglob("*.py"))


@pytest.mark.parametrize("part", ALLOWED)
def test_part_imports_only_what_lies_below(part: str) -> None:
    files = files_of(part)
    assert files, f"no file of {part} found"
    for path in files:
        for module in imported_modules(path):
            words = module.split(".")
            if words[0] == "megatron_multiverse" and len(words) > 1 and words[1] != part:
                assert words[1] in ALLOWED[part] | {"__version__"}, f"{path} imports {module}"
            if part in NO_TORCH:
                assert words[0] not in {"torch", "megatron", "transformers"}, f"{path} imports {module}"
            if part == "kernels":
                assert words[0] in {
                    "__future__",
                    "torch",
                    "triton",
                    "megatron_multiverse",
                    "collections",
                    "typing",
                    "dataclasses",
                    "functools",
                    "hashlib",
                    "math",
                    "importlib",
                    "itertools",
                    "logging",
                    # one backend's own packages, imported only where that backend runs
                    "flash_attn",
                    "cutlass",
                    "quack",
                }, f"{path} imports {module}"


def test_every_part_has_a_rule() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "__pycache__"} <= set(ALLOWED)


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("megatron_multiverse/data/x.py", "from .packing import pack", "megatron_multiverse.data.packing.pack"),
        ("megatron_multiverse/data/x.py", "from . import packing", "megatron_multiverse.data.packing"),
        ("megatron_multiverse/data/x.py", "from ..model import gpt", "megatron_multiverse.model.gpt"),
        ("megatron_multiverse/x.py", "from .model.gpt import y", "megatron_multiverse.model.gpt.y"),
        ("kernels/rope/x.py", "from ...data.packing import pack", "megatron_multiverse.data.packing.pack"),
        ("kernels/rope/x.py", "from torch import nn", "torch.nn"),
    ],
)
def test_relative_imports_are_resolved(file: str, line: str, found: str) -> None:
    (node,) = ast.parse(line).body
    assert isinstance(node, ast.ImportFrom)
    assert f"{source_of(node, ROOT / file)}.{node.names[0].name}" == found


def test_importing_the_package_is_light_and_quick() -> None:
    """A fresh process; the best of three, so that a busy machine does not fail it."""
    code = (
        "import sys, time; start = time.perf_counter(); import megatron_multiverse; "
        "seconds = time.perf_counter() - start; import megatron_multiverse.structure; "
        "print('torch' in sys.modules, seconds)"
    )
    seconds = []
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        has_torch, taken = result.stdout.split()
        assert has_torch == "False"
        seconds.append(float(taken))
    assert min(seconds) < 0.2
