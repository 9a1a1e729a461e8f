"""The sum over GPUs with residual and norm, with ranks that share one GPU: each has a stream of its own."""

from __future__ import annotations

import pytest
import torch

from megatron_multiverse.kernels.sum_norm import sum_norm_reference

if torch.cuda.is_available():
    from megatron_multiverse.kernels.sum_norm.triton_push import Exchange, sum_norm_push

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
EPS, MOST_ROWS, SUMS = 1e-6, 32, 40


def exchanges(ranks: int, width: int, dtype: torch.dtype) -> list[Exchange]:
    """Memory of ranks that reach each other."""
    places = torch.empty(ranks, 2, ranks, MOST_ROWS, width, device="cuda", dtype=dtype)
    flags = torch.zeros(ranks, 2, ranks, MOST_ROWS, device="cuda", dtype=torch.int32)
    addresses = [torch.tensor([x.data_ptr() for x in memory], device="cuda") for memory in (places, flags)]
    return [
        Exchange(
            rank=rank, places=places[rank], flags=flags[rank], place_addresses=addresses[0], flag_addresses=addresses[1]
        )
        for rank in range(ranks)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "rows", "width"), [(2, 1, 3584), (2, 32, 3584), (4, 8, 1536), (3, 5, 136)])
def test_chains_of_sums_in_graphs_equal_the_reference(ranks: int, rows: int, width: int, dtype: torch.dtype) -> None:
    """Every rank replays a graph of sums, each of the one before it; the ranks run at the same time, and again."""
    generator = torch.Generator("cuda").manual_seed(rows)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    memory, start, scales = exchanges(ranks, width, dtype), draw(ranks, rows, width), draw(SUMS, width) * 0.3
    streams = [torch.cuda.Stream() for _ in range(ranks)]

    def chain(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        part, residual = start[rank], torch.zeros_like(start[rank])
        for number in range(SUMS):
            residual, normed = sum_norm_push(part, residual, scales[number], EPS, memory[rank], number % 2)
            part = normed * (rank + 1)
        return residual, part

    # Each rank compiles a kernel of its own, which must not wait for one that is still to be loaded.
    for exchange in memory:
        exchange.flags.fill_(1)
        sum_norm_push(start[0], start[0], scales[0], EPS, exchange, 0)
        torch.cuda.synchronize()
    for exchange in memory:
        exchange.flags.zero_()
    graphs, results = [], []
    for rank in range(ranks):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=streams[rank]):
            results.append(chain(rank))
    for _ in range(5):
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    parts, residual = list(start), torch.zeros_like(start[0])
    for number in range(SUMS):
        residual, normed = sum_norm_reference(parts, residual, scales[number], EPS)
        parts = [normed * (rank + 1) for rank in range(ranks)]
    for got_residual, got_part in results:
        assert torch.equal(got_residual, results[0][0]), "ranks must agree bit by bit"
        error = (got_residual.double() - residual.double()).norm() / residual.double().norm()
        assert error < (1e-4 if dtype is torch.float32 else 3e-2)
        assert torch.isfinite(got_part).all()
    assert not any(exchange.flags.any() for exchange in memory), "all flags are down again"
