"""What the first rank of an engine tells the others while they run no plans."""

from __future__ import annotations

from typing import Any

import msgpack
import torch
from torch import distributed

from megatron_multiverse.parallel.ranks import current_ranks


def tell(message: dict[str, Any]) -> None:
    """On the first rank: say something to all others, as msgpack over the host."""
    if current_ranks().size > 1:
        data = msgpack.packb(message)
        distributed.broadcast(torch.tensor([len(data)]), 0)
        distributed.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0)


def hear() -> dict[str, Any]:
    """On the others: what the first rank says."""
    size = torch.zeros(1, dtype=torch.int64)
    distributed.broadcast(size, 0)
    data = torch.empty(int(size), dtype=torch.uint8)
    distributed.broadcast(data, 0)
    message: dict[str, Any] = msgpack.unpackb(bytes(data.numpy()))
    return message
