"""Ranks that meet as torchrun starts them: they agree, and end together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.parallel.local_ranks import run_ranks
from megatron_multiverse.parallel.ranks import Ranks, current_ranks, joined_ranks

SCRIPT = """
import time
from megatron_multiverse.parallel.ranks import joined_ranks
with joined_ranks(2) as ranks:
    assert ranks.sum([ranks.rank, 1]) == [1, 2]
    if ranks.rank == 1:
        raise ValueError("a fault of rank 1")
    time.sleep(60)
"""


def start() -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            **pipes,
        )
        for rank in range(2)
    ]


def test_ranks_end_together_and_the_one_that_failed_says_why() -> None:
    processes = start()
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode for process in processes), outputs
    assert "Traceback" in outputs[1][1] and "ValueError: a fault of rank 1" in outputs[1][1]
    assert "rank 0 ends, because another one failed: rank 1: ValueError" in outputs[0][1]


RESTARTED = """
import os
from megatron_multiverse.parallel.ranks import joined_ranks
with joined_ranks(2) as ranks:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and ranks.rank == 1:
        raise ValueError("a fault of the first start")
    assert ranks.sum([ranks.rank, 1]) == [1, 2]
"""


def test_torchrun_can_start_ranks_again(tmp_path: Path) -> None:
    """What the processes of the first start left in the store is not read by those of the second one."""
    (tmp_path / "restarted.py").write_text(RESTARTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", str(tmp_path / "restarted.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ValueError: a fault of the first start" in done.stderr


def together() -> list[object]:
    """What the methods give on each rank of three."""
    ranks = current_ranks()
    found: list[object] = [ranks.gather(ranks.rank), ranks.gather_to_first(ranks.rank), ranks.first(lambda: "once")]
    found += [ranks.any(ranks.rank == 2), ranks.any(False)]
    for call in (lambda: ranks.check_same("the seed", ranks.rank // 2, "use one"), lambda: ranks.first(refuse)):
        try:
            call()
        except ConfigError as error:
            found.append(str(error))
    return found


def refuse() -> None:
    raise ConfigError("no such folder")


def test_what_one_rank_finds_all_ranks_know() -> None:
    errors = ["the seed is 0 on rank 0 and 1 on rank 2: use one", "no such folder"]
    everyone = run_ranks(together, 3)
    for rank, found in enumerate(everyone):
        assert found == [[0, 1, 2], [0, 1, 2] if rank == 0 else [], "once", True, False, *errors]


def test_one_rank_needs_no_others() -> None:
    ranks = Ranks()
    assert (ranks.sum([3]), ranks.gather("a"), ranks.first(lambda: 1), ranks.any(True)) == ([3], ["a"], 1, True)


def test_a_rank_that_does_not_know_its_place_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # another test may have made a group
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ConfigError, match="there are 2 ranks, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        joined_ranks(2),
    ):
        raise AssertionError("unreachable")
