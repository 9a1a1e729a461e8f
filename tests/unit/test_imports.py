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
    "config": {"errors", "config_io", "config_model"},
    "config_model": {"errors", "config_io"},
    "files": set(),
    "config_io": {"errors"},
    "structure": {"errors"},
    "kernels": set(),
    "data": {"errors", "config", "files", "structure", "cli"},
    "model": {"errors", "config", "config_model", "files", "structure", "kernels"},
    "conversion": {"errors", "config", "config_io", "config_model", "files", "structure", "data", "model"},
    "training": {"errors", "config", "files", "structure", "data", "model"},
    "inference": {"errors", "config", "files", "structure", "kernels", "data", "model"},
    "evaluation": {"errors", "config", "files", "structure", "data", "model", "inference"},
}
NO_TORCH = {"errors", "config", "config_io", "config_model", "files", "structure"}


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def files_of(part: str) -> list[Path]:
    if part == "kernels":
        return [path for path in (ROOT / "kernels").rglob("*.py") if "benchmarks" not in path.parts]
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
                    "math",
                }, f"{path} imports {module}"


def test_every_part_has_a_rule() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "__pycache__"} <= set(ALLOWED)


def test_importing_the_package_is_light() -> None:
    code = "import sys, megatron_multiverse, megatron_multiverse.structure; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
