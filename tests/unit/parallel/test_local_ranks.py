from __future__ import annotations

import os
import pickle
import time
from multiprocessing import Pipe

import pytest
import torch

from megatron_multiverse.errors import RankError
from megatron_multiverse.parallel.local_ranks import _collect, run_ranks
from tests.waiting import PATIENCE_S


def sum_of_ranks() -> int:
    value = torch.tensor([torch.distributed.get_rank() + 1])
    torch.distributed.all_reduce(value)
    return int(value)


def fail_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("this one")
    torch.distributed.barrier()


def die_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        os._exit(9)
    torch.distributed.barrier()


def sleep() -> None:
    time.sleep(600)


def test_results_come_in_the_order_of_ranks_and_groups_work() -> None:
    assert run_ranks(sum_of_ranks, 2) == [3, 3]


def test_of_several_failures_the_first_is_reported() -> None:
    """A parent that is late finds the failures of all ranks at once."""
    pipes = [Pipe(duplex=False) for _ in range(3)]
    for (_, writer), when in zip(pipes, (7.0, 3.0, 5.0), strict=True):
        writer.send_bytes(pickle.dumps((when, f"failed at {when}", None)))
    with pytest.raises(RankError, match=r"rank 1 of 3 failed at 3\.0"):
        _collect([reader for reader, _ in pipes], timeout=PATIENCE_S)


def test_a_failing_dying_or_hanging_rank_is_reported_at_once() -> None:
    """Not when time is up for those that wait for it, which is later than pytest's own limit."""
    with pytest.raises(RankError, match=r"rank 1 of 2 failed:(.|\n)*ValueError: this one"):
        run_ranks(fail_on_rank_1, 2)
    with pytest.raises(RankError, match=r"rank . of 2"):
        run_ranks(die_on_rank_1, 2)
    with pytest.raises(RankError, match=r"ranks \[0, 1\] of 2 did not finish within 2 s"):
        run_ranks(sleep, 2, timeout=2)
