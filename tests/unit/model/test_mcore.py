"""How megatron-core is imported; the process groups that we make ourselves go when the process does, others' stay."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from megatron_multiverse.model import mcore
from tests.waiting import PATIENCE_S

OURS = "mcore.ensure_parallel_state()"
THEIRS = "torch.distributed.init_process_group('gloo', store=HashStore(), rank=0, world_size=1)"
OTHERS_SINCE = f"{OURS}; torch.distributed.destroy_process_group(); {THEIRS}"
FORKED = f"{OURS}; pid = os.fork(); pid or sys.exit(0); os.waitpid(pid, 0); print(torch.distributed.is_initialized())"


@pytest.mark.parametrize(
    ("code", "initialized"),
    [(OTHERS_SINCE, ["True"]), (FORKED, ["True", "True", "False"])],
    ids=["others made since stay", "ours goes, but not by a forked child"],
)
def test_our_group_is_destroyed_at_exit(code: str, initialized: list[str]) -> None:
    program = (
        "import atexit, os, sys, torch; from torch._C._distributed_c10d import HashStore\n"
        "atexit.register(lambda: print(torch.distributed.is_initialized(), flush=True))\n"  # runs last
        "from megatron_multiverse.model import mcore\n" + code
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == initialized
    assert "destroy_process_group() was not called" not in done.stderr


def test_groups_of_ranks_that_are_gone_are_made_anew() -> None:
    """A model can be built after a dry run, or a run of several ranks, has taken its process group along."""
    code = f"{OURS}; torch.distributed.destroy_process_group(); print(mcore.tensor_parallel_place())"
    program = f"import torch\nfrom megatron_multiverse.model import mcore\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "(1, 0)"


@pytest.mark.parametrize("make", [OURS, "mcore.ensure_process_group(); mcore.set_parallel_sizes(1, 1)"])
def test_no_second_groups_over_gloo_are_made(make: str) -> None:
    """Nothing here asks for them, and each would have threads of its own."""
    program = (
        f"from megatron_multiverse.model import mcore\n{make}\n"
        "from torch.distributed.distributed_c10d import _world; print(*(group.group_desc for group in _world.pg_map))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S)
    assert "TENSOR_MODEL_PARALLEL_GROUP" in done.stdout and "GLOO" not in done.stdout, done.stderr


def test_fused_functions_are_compiled_once_at_their_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, object]] = []

    def compile_now(function: Callable[..., int], **options: object) -> Callable[..., int]:
        compiled.append(options)
        return function

    monkeypatch.setattr(mcore, "_compile_now", compile_now)
    plain = mcore._compile_at_first_call(lambda x: x + 1)
    with_options = mcore._compile_at_first_call(dynamic=True)(lambda x: x + 2)
    assert not compiled
    assert [plain(1), plain(2), with_options(1), with_options(2)] == [2, 3, 3, 4]
    assert compiled == [{}, {"dynamic": True}]


def test_importing_megatron_core_imports_no_compiler() -> None:
    code = "import sys, megatron_multiverse.model; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
