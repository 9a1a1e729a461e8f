"""Sums of a decode step's rows over tensor parallel GPUs: PyTorch's symmetric memory beside NCCL, both in CUDA graphs.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.small_sums

A graph holds as many sums as a model of 28 layers needs in a step, each of what the one before it gave.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from benchmarks.kernels.record import Recorder
from benchmarks.training_layouts import RESULTS
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference.step.symmetric_sum import MOST_BYTES, SymmetricSum
from megatron_multiverse.kernels.fused_linear import norm
from megatron_multiverse.kernels.sum_norm import sum_norm_reference
from megatron_multiverse.parallel.ranks import joined_ranks

SUMS = 56
REPLAYS = 50


@dataclass
class Options:
    """What to measure."""

    rows: tuple[int, ...] = (1, 8, 32, 64, 128)
    """Tokens of a step."""
    hidden_size: int = 3584
    """Width of a row, in bfloat16."""
    output: str | None = None
    """Folder of the results; default benchmarks/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


def check(symmetric: SymmetricSum, x: Tensor) -> None:
    """Both sums equal their references; the one with residual and norm many times over, in turns."""
    if symmetric.takes(x):
        reference = x.clone()
        distributed.all_reduce(reference)
        torch.testing.assert_close(symmetric(x), reference, rtol=1e-2, atol=1e-2)
    world = distributed.get_world_size()
    weight, residual = torch.linspace(0.5, 1.5, x.shape[1], device=x.device, dtype=x.dtype), torch.ones_like(x)
    for number in range(20):
        part = x * (number + 1)
        parts = [torch.empty_like(part) for _ in range(world)]
        distributed.all_gather(parts, part)
        got = symmetric.add_norm(part, residual, weight, 1e-6, turn=number % 2)
        for mine, want in zip(got, sum_norm_reference(parts, residual, weight, 1e-6), strict=True):
            torch.testing.assert_close(mine, want, rtol=2e-2, atol=2e-2)


def measure(symmetric: SymmetricSum, x: Tensor) -> dict[str, float]:
    """Microseconds of a sum in each way."""
    weight = torch.ones_like(x[0])

    def by_nccl(y: Tensor) -> Tensor:
        total = y.clone()  # memory of the graph, as a part is in a step
        distributed.all_reduce(total)
        return total

    def by_nccl_with_norm(y: Tensor) -> Tensor:
        normed: Tensor = norm(torch.add(x, by_nccl(y)), weight, 1e-6)
        return normed

    def with_norm(y: Tensor) -> Tensor:
        _, first = symmetric.add_norm(y, x, weight, 1e-6, turn=0)
        return symmetric.add_norm(first, x, weight, 1e-6, turn=1)[1]

    times = {"nccl_us": microseconds(x, by_nccl)}
    if symmetric.takes(x):
        times["symmetric_memory_us"] = microseconds(x, symmetric)
    times["nccl_norm_us"] = microseconds(x, by_nccl_with_norm)
    times["sum_norm_us"] = microseconds(x, with_norm) / 2
    return times


def microseconds(x: Tensor, call: Callable[[Tensor], Tensor]) -> float:
    """Of one call within a graph of many."""

    def chain() -> Tensor:
        y = x
        for _ in range(SUMS):
            y = call(y)
        return y

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        chain()
    graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(REPLAYS):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6 / (SUMS * REPLAYS)


def main() -> None:
    """Measure every number of rows."""
    o = parse_options(Options)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world < 2 or not torch.cuda.is_available():
        raise ConfigError(f"needs two GPUs or more, one rank each; {world} ranks were started: use torchrun")
    with joined_ranks(world) as ranks:
        group = distributed.group.WORLD
        assert group is not None
        device = torch.device("cuda", torch.cuda.current_device())
        recorder = None
        if ranks.is_first:
            command = f"torchrun --standalone --nproc-per-node {world} -m benchmarks.small_sums"
            key = ("gpus", "rows", "hidden_size")
            recorder = Recorder("small_sums", o.output or str(RESULTS), o.commit, key=key, command=command)
        symmetric = SymmetricSum.where_possible(group, torch.bfloat16, device, o.hidden_size)
        if symmetric is None:
            raise ConfigError("these GPUs cannot read each other's memory")
        for rows in o.rows:
            x = torch.randn(rows, o.hidden_size, device=device, dtype=torch.bfloat16)
            check(symmetric, x)
            times = measure(symmetric, torch.zeros_like(x))
            if recorder is not None:
                recorder.add(gpus=world, rows=rows, hidden_size=o.hidden_size, kib=x.nbytes / 1024, **times)
        if recorder is not None:
            recorder.table(
                "One sum over the GPUs, within a CUDA graph of many: by NCCL, by symmetric memory; with residual and "
                "RMSNorm: by NCCL, torch and a norm in three launches, by kernels/sum_norm in one. The engine takes "
                f"symmetric memory up to {MOST_BYTES // 1024} KiB."
            )


if __name__ == "__main__":
    run_tool(main)
