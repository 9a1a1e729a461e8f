"""Whether weights that a trainer sends arrive, as SGLang has it: note them, make them useless, have them sent, compare.

Hashes are noted, not the weights, which would take their size of the host's memory. The engine takes no step meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_multiverse.errors import GenerationError
from megatron_multiverse.model.weights import weight_state

CheckAction = Literal["snapshot", "reset_tensors", "compare"]
_CHUNK = 1 << 24
"""Numbers that are made, or copied to the host, at once."""
_THREADS = 8
"""That hash a tensor each, and hold a chunk of it on the host; hashlib lets them run side by side."""


class WeightChecks:
    """What is known of this rank's weights at the time of a snapshot.

    Args:
        model: this rank's part.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._noted: dict[str, str] | None = None

    def run(self, action: CheckAction) -> list[str]:
        """Do one of the three.

        Args:
            action: snapshot: note the weights; reset_tensors: write random numbers into all of them, in place; compare
                them with the snapshot.

        Returns:
            Of compare: megatron-core's names of the tensors that differ in any bit; else none.

        Raises:
            GenerationError: compare without a snapshot.
        """
        does: dict[CheckAction, Callable[[], list[str]]] = {
            "snapshot": self._snapshot,
            "reset_tensors": self._reset,
            "compare": self._compare,
        }
        return does[action]()

    def _snapshot(self) -> list[str]:
        self._noted = self._hashes()
        return []

    @torch.no_grad()
    def _reset(self) -> list[str]:
        for tensor in weight_state(self._model).values():
            for part in tensor.view(-1).split(_CHUNK):
                part.copy_(torch.rand(part.shape, device=part.device))
        return []

    def _compare(self) -> list[str]:
        if self._noted is None:
            raise GenerationError("there is no snapshot to compare with; ask for action snapshot before")
        now = self._hashes()
        return [name for name, digest in self._noted.items() if now[name] != digest]

    def _hashes(self) -> dict[str, str]:
        state = weight_state(self._model)
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(state, pool.map(_hash, state.values()), strict=True))


def _hash(tensor: Tensor) -> str:
    """Of all bits of a tensor."""
    digest = hashlib.sha256()
    for part in tensor.detach().contiguous().view(-1).split(_CHUNK):
        digest.update(part.view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
