from __future__ import annotations

import os
import time

import pytest
import torch

from megatron_multiverse.errors import RankError
from megatron_multiverse.parallel.local_ranks import run_ranks


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
    time.sleep(60)


def test_results_come_in_the_order_of_ranks_and_groups_work() -> None:
    assert run_ranks(sum_of_ranks, 2) == [3, 3]


def test_a_failing_dying_or_hanging_rank_is_reported_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 of 2 failed:(.|\n)*ValueError: this one"):
        run_ranks(fail_on_rank_1, 2)
    with pytest.raises(RankError, match=r"rank . of 2"):
        run_ranks(die_on_rank_1, 2)
    with pytest.raises(RankError, match=r"ranks \[0, 1\] of 2 did not finish within 2 s"):
        run_ranks(sleep, 2, timeout=2)
    assert time.monotonic() - start < 30
