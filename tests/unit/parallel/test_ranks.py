"""Ranks that meet as torchrun starts them: they agree, and end together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.parallel.local_ranks import forking_context, run_ranks
from megatron_multiverse.parallel.ranks import Ranks, current_ranks, joined_ranks
from tests.waiting import PATIENCE_S


def one_of_two(rank: int, rendezvous_url: str, said: Path) -> None:
    """A rank; what it says goes into a file. The second one fails while the first one is busy with something else."""
    with said.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    with joined_ranks(2, rendezvous_url=rendezvous_url) as ranks:
        assert ranks.sum([ranks.rank, 1]) == [1, 2]
        if ranks.rank == 1:
            raise ValueError("a fault of rank 1")
        time.sleep(600)


def test_ranks_end_together_and_the_one_that_failed_says_why(tmp_path: Path) -> None:
    context = forking_context()
    url, said = f"file://{tmp_path}/rendezvous", [tmp_path / f"rank {rank}" for rank in range(2)]
    processes = [context.Process(target=one_of_two, args=(rank, url, said[rank])) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=PATIENCE_S / 2)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    outputs = [file.read_text() for file in said]
    assert None not in codes and all(codes), (codes, outputs)
    assert "Traceback" in outputs[1] and "ValueError: a fault of rank 1" in outputs[1]
    assert "rank 0 ends, because another one failed: rank 1: ValueError" in outputs[0]


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
    torchrun += ["--log-dir", str(tmp_path / "logs")]  # else a folder among the system's temporary ones, which stays
    command = [*torchrun, "--max-restarts", "1", str(tmp_path / "restarted.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
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
