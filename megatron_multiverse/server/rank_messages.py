"""What the ranks of an engine tell each other while they run no plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import torch
from torch import distributed

from megatron_multiverse.errors import ConfigError, GenerationError
from megatron_multiverse.parallel.ranks import current_ranks


class PartlyChanged(GenerationError):
    """Changing weights in place failed on a rank: some of them are others now, and which is not known."""


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


def change_weights(change: Callable[[], object]) -> None:
    """Change weights in place. All ranks call this, once each has what it needs.

    Raises:
        PartlyChanged: it failed midway, here or on another rank.
        ConfigError: as `change` raises it, before anything has changed and on all ranks alike.
    """
    failure: Exception | None = None
    try:
        change()
    except ConfigError:
        raise
    except Exception as error:  # whatever it is, the other ranks wait to hear of it
        failure = error
    if current_ranks().any(failure is not None):
        raise PartlyChanged(
            "weights were changed in part only, the engine's log says why; send all of them, or read them by "
            "update_weights_from_disk"
        ) from failure
