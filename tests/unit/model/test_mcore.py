"""The process groups that we make ourselves go when the process does; others' stay."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == initialized
    assert "destroy_process_group() was not called" not in done.stderr
