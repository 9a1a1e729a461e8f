from __future__ import annotations

import os
import time

import pytest
import torch

from megatron_multiverse.checkpoints.ranks import pipeline_logits, run_ranks, set_parallel_sizes
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.families import qwen2
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.weights import weight_state


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


def logits_of_two_stages() -> list[torch.Tensor | None]:
    """Two pipeline stages, tied: the second keeps a copy of the embedding of the first."""
    config = qwen2(
        num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, vocab_size=32, max_sequence_length=32
    )
    set_parallel_sizes(1, 2)
    model = build_gpt_model(config, seed=3)
    ids = torch.arange(12).view(2, 6)
    return [pipeline_logits(model, ids, ids % 6, LayoutParams.causal(ids)), *weight_state(model).values()]


def test_results_come_in_the_order_of_ranks_and_groups_work() -> None:
    assert run_ranks(sum_of_ranks, 2) == [3, 3]


def test_a_failing_dying_or_hanging_rank_is_reported_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"rank 1 of 2 failed:(.|\n)*ValueError: this one"):
        run_ranks(fail_on_rank_1, 2)
    with pytest.raises(CheckpointError, match=r"rank . of 2"):
        run_ranks(die_on_rank_1, 2)
    with pytest.raises(CheckpointError, match=r"ranks \[0, 1\] of 2 did not finish within 2 s"):
        run_ranks(sleep, 2, timeout=2)
    assert time.monotonic() - start < 30


def test_the_last_stage_returns_the_logits() -> None:
    (first, *_), (last, *_) = run_ranks(logits_of_two_stages, 2)
    assert first is None and last.shape == (2, 6, 32) and torch.isfinite(last).all()
