"""Random integers of decode steps, for the kernels that move them on."""

from __future__ import annotations

import torch

from megatron_multiverse.kernels.decode_step import Moving


def random_moving(generator: torch.Generator, n: int, items: int, sharers: int, page_size: int) -> Moving:
    """Of a padded step; a part of the rows have last pages whose slots are told."""

    def some(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    return Moving(
        sources=some(-1, n, n),
        positions=some(0, 9, n),
        indices=some(0, 9, n),
        write_slots=some(-1, 3, 3 * n),
        items=some(0, 99, items, 4).int(),
        tokens=some(-1, n, items, sharers).int(),
        limits=some(0, 99, items, sharers).int(),
        pages=some(0, 9 * page_size, 2 * n).int(),
        at_end=some(0, 2, items).int(),
        ends=torch.where(some(0, 3, n) > 0, torch.randperm(2 * n, generator=generator)[:n], -1).int(),
    )
