"""Imports go one way and warn of nothing, light parts stay light, and importing the package costs nothing."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_multiverse"

# Which parts each part may import. import-linter checks the package too, but it does not see kernels/, which stands
# outside of the package's folder (package_dir), and it does not know examples/ and tools/.
ALLOWED = {
    "errors": set(),
    "child_processes": set(),
    "checkout": set(),
    "checksums": {"errors", "files"},
    "cli": {"cli_files", "cli_messages", "errors"},
    "cli_files": {"errors"},
    "cli_messages": set(),
    "config": {"errors", "structure"},
    "dtypes": set(),
    "files": set(),
    "grading": set(),
    "large_files": {"files"},
    "locked_folder": {"errors", "files"},
    "patience": set(),
    "progress": set(),
    "weight_names": set(),
    "structure": {"errors"},
    "kernels": {"errors", "structure"},
    "data": {"child_processes", "errors", "config", "files", "progress", "structure", "cli"},
    "curation": {
        "child_processes",
        "errors",
        "config",
        "files",
        "grading",
        "locked_folder",
        "progress",
        "structure",
        "data",
    },
    "parallel": {"errors"},
    "model": {"checksums", "errors", "config", "dtypes", "files", "weight_names", "structure", "kernels", "parallel"},
    "checkpoints": {"large_files", "progress"},
    "training": {"checkpoints", "child_processes"},
    "inference": {"checkpoints"},
    "server": {"errors", "config", "structure", "data", "dtypes", "parallel", "model", "checkpoints", "inference"},
    "clients": {"errors", "config", "files", "patience", "structure", "data", "inference", "views"},
    "views": {"errors", "config", "files", "structure", "data", "model", "checkpoints", "inference"},
}
ALLOWED["data"] |= {"checksums", "large_files"}
ALLOWED["curation"] |= {"patience"}
ALLOWED["checkpoints"] |= ALLOWED["model"] | {"data", "model"}
ALLOWED["training"] |= ALLOWED["checkpoints"]
ALLOWED["inference"] |= ALLOWED["checkpoints"]
ALLOWED["evaluation"] = ALLOWED["views"] | {
    "clients",
    "curation",
    "dtypes",
    "grading",
    "locked_folder",
    "parallel",
    "patience",
    "progress",
    "training",
    "views",
}
ALLOWED["rl"] = ALLOWED["training"] | ALLOWED["inference"] | {"grading", "training", "inference"}
NO_TORCH = {
    "checksums",
    "child_processes",
    "errors",
    "config",
    "curation",
    "files",
    "grading",
    "large_files",
    "locked_folder",
    "patience",
    "progress",
    "structure",
    "weight_names",
}


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
                    "numpy",
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


def test_importing_the_package_is_light() -> None:
    """A fresh process: the package alone imports nothing, its structure numpy."""
    code = (
        "import sys; before = set(sys.modules); "
        "import megatron_multiverse; print(*set(sys.modules) - before); "
        "import megatron_multiverse.structure; print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    alone, structure = ({name.split(".")[0] for name in line.split()} for line in done.stdout.splitlines())
    assert alone == {"megatron_multiverse"}
    assert structure - set(sys.stdlib_module_names) == {"megatron_multiverse", "numpy"}


def module_name(path: Path) -> str:
    words = path.relative_to(ROOT).with_suffix("").parts
    words = ("megatron_multiverse", *words) if words[0] == "kernels" else words
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


MODULES = {module_name(path): path for root in (PACKAGE, ROOT / "kernels") for path in sorted(root.rglob("*.py"))}
# Packages that only machines with a GPU have; the modules that import them at the top are not imported elsewhere.
GPU_PACKAGES = ("triton", "flash_attn", "cutlass", "quack")
ABSENT = {name for name in GPU_PACKAGES if importlib.util.find_spec(name) is None}


def imports_at_the_top(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements outside of functions, those for type checking alone included."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def imported_names(path: Path) -> set[str]:
    """What these statements read. `from package.module import x` reads the module, not the package around it."""
    found = set()
    for node in imports_at_the_top(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            source = source_of(node, path)
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else source for name in names}
    return found


def can_be_imported(name: str) -> bool:
    return not any(found.split(".")[0] in ABSENT for found in imported_names(MODULES[name]))


IMPORT = """
import importlib, json, os, sys, tempfile, traceback

def import_all(names):
    for name in names:
        importlib.import_module(name)
    for name in names:
        package, _, last = name.rpartition(".")
        assert not package or getattr(sys.modules[package], last) is sys.modules[name], name
"""
IMPORT_EACH = """
import torch.distributed.checkpoint, torch.distributed.tensor

said = {}
for name in sys.argv[1:]:
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            try:
                import_all([name])
            except BaseException:
                traceback.print_exc()
            sys.exit()  # as an interpreter ends: what it prints then counts, too
        status = os.waitpid(child, 0)[1]
        file.seek(0)
        said[name] = file.read().decode() or f"{status or ''}"
print(json.dumps(said))
"""


def run_strictly(code: str, *names: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh process where every warning is an error."""
    return subprocess.run([sys.executable, "-W", "error", "-c", IMPORT + code, *names], capture_output=True, text=True)


def import_all(names: list[str]) -> subprocess.CompletedProcess[str]:
    """Import modules in this order in one fresh process; then look at each by name."""
    return run_strictly("import_all(sys.argv[1:])", *names)


@functools.cache
def imported_alone() -> dict[str, str]:
    """What is said when each module of ALONE is imported first, from the import to the end of the process. It is forked
    from one that has imported what takes most of the time, torch with its checkpoints and DTensor: a module that uses
    these without importing them is not found here."""
    done = run_strictly(IMPORT_EACH, *ALONE)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    said: dict[str, str] = json.loads(done.stdout)
    return said


# megatron-core warns when it is imported, unless `model/` imports it. Alone are tested: a module of `model/`, and every
# module elsewhere that imports megatron-core itself.
ALONE = ["megatron_multiverse.model.attention", "megatron_multiverse.inference"]
ALONE += [
    name
    for name, path in MODULES.items()
    if any(found.startswith("megatron.core") for found in imported_names(path)) and name.split(".")[1] != "model"
]


@pytest.mark.parametrize("step", [1, -1], ids=["in order", "backwards"])
def test_importing_all_modules_warns_of_nothing(step: int) -> None:
    """No name of a package hides one of its modules."""
    everything = [name for name in MODULES if can_be_imported(name)]
    assert len(everything) > 100
    assert_silent(import_all(everything[::step]))


@pytest.mark.parametrize("name", ALONE)
def test_importing_a_module_first_warns_of_nothing(name: str) -> None:
    said = imported_alone()
    assert said.keys() == {*ALONE} and said[name] == ""


def assert_silent(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr[-2000:]


def defines_its_own_name(path: Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == path.stem for node in body)


def test_no_module_is_called_like_what_it_defines() -> None:
    """Else `package.name` would be the module or the function, depending on who was imported first."""
    assert not {name for name, path in MODULES.items() if defines_its_own_name(path)}


def test_no_modules_import_each_other() -> None:
    """Imports for type checking alone count too; those inside functions do not, they are late on purpose."""
    arrows = {name: imported_names(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    list(graphlib.TopologicalSorter(arrows).static_order())  # CycleError shows the cycle


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("text", ("torch", "megatron", "cache", "step", "scheduler", "engine")),
        ("cache", ("torch", "megatron", "text", "step", "scheduler", "engine")),
        ("step", ("text", "cache", "scheduler", "engine")),
    ],
)
def test_the_rooms_of_inference_do_not_know_each_other(room: str, forbidden: tuple[str, ...]) -> None:
    """Text knows no page and no tensor, the cache no text and no tensor, a step nothing but integers and tensors."""
    own = "megatron_multiverse.inference."
    for path in sorted((PACKAGE / "inference" / room).rglob("*.py")):
        for module in imported_modules(path):
            first = module.removeprefix(own).split(".")[0]
            assert first not in forbidden, f"{path} imports {module}"


def test_a_benchmark_that_imports_others_is_started_as_a_module() -> None:
    """`python benchmarks/NAME.py` does not find them: only the folder of the file itself is on the path."""
    for file in sorted((ROOT / "benchmarks").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if re.search(r"^from benchmarks\b", text, re.MULTILINE):
            assert f"python {file.relative_to(ROOT)}" not in text, f"{file}: name python -m in its docstring"


def test_files_that_packages_are_read_by_exist() -> None:
    """A package says in its docstring which files to read; a file that was renamed since is no help."""
    for package in PACKAGE.rglob("__init__.py"):
        docstring = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
        named = re.findall(r"`([\w/]+\.py)`", docstring)
        missing = [name for name in named if not any((at / name).exists() for at in (package.parent, PACKAGE, ROOT))]
        assert not missing, f"{package.parent.name}/__init__.py names {', '.join(missing)}"
