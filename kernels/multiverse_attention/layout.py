"""What one microbatch attends to, in the form that every backend takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .choose_tiles import tile_lists
from .tiles import TILE, TileLists


@dataclass(frozen=True)
class AttentionCase:
    """The circumstances of a call; a backend that cannot cope with them says why."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    deterministic: bool = False
    """torch.use_deterministic_algorithms is on, which asks for the same bits in every run."""
    placed: bool = False
    """The layout has an `index`."""


@dataclass(eq=False)
class AttentionLayout:
    """Labels and places of queries and keys. It keeps the plan that a backend makes from them, for all layers.

    So the tensors must not change afterwards: a microbatch with other labels gets another layout.

    Without `key_r` queries and keys are the same tokens. With it they are different ones (context parallelism: the
    queries of this rank, the keys of all ranks); then `index` and `key_index` say where each stands in its row.

    Places count from 0 to the end of the *packed* row, whatever documents are in it. They are not position ids, which
    begin again in each document and are shared by sibling paths: with those, documents would see each other.

    Raises:
        ValueError: labels, places and tile lists do not fit each other.
    """

    r: Tensor
    """int labels [b, s_q], see README.md."""
    index: Tensor | None = None
    """int [b, s_q], place of each query in its packed row; None means 0..s_q-1."""
    key_r: Tensor | None = None
    """int labels [b, s_k] of the keys."""
    key_index: Tensor | None = None
    """int [b, s_k], place of each key in its packed row."""
    lists: TileLists | None = None
    """Tile lists of these labels, padded to whole tiles only, if they were made already (by `structure_scan`)."""
    _plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    _versions: tuple[int, ...] = field(default=(), init=False, repr=False)
    """How often the tensors had been changed in place when the first plan was made."""

    def __post_init__(self) -> None:
        given = {
            name: None if getattr(self, name) is None else tuple(getattr(self, name).shape)
            for name in ("r", "index", "key_r", "key_index")
        }
        if self.r.dim() != 2 or (self.index is not None and self.index.shape != self.r.shape):
            raise ValueError(f"r and index must be [b, s_q], got {given}")
        if (self.key_r is None) != (self.key_index is None) or (self.key_r is not None and self.index is None):
            raise ValueError(f"keys of their own need key_r, key_index and index together, got {given}")
        if self.key_r is not None and self.key_index is not None:
            b = self.r.shape[0]
            if self.key_r.dim() != 2 or self.key_r.shape[0] != b or self.key_index.shape != self.key_r.shape:
                raise ValueError(f"key_r and key_index must be [b, s_k] with b = {b}, got {given}")
        b, *lengths = self.shape
        if self.lists is not None and not self.lists.fit(b, *(-(-length // TILE) * TILE for length in lengths)):
            raise ValueError(
                f"lists are for {self.lists.shape} tiles of {self.lists.query_size}; a layout of {self.shape} needs "
                "others: make them for its labels, or leave lists out"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(b, s_q, s_k)."""
        keys = self.r if self.key_r is None else self.key_r
        return self.r.shape[0], self.r.shape[1], keys.shape[1]

    def tile_lists(self, queries: int, keys: int) -> TileLists:
        """Tile lists for lengths padded to `queries` and `keys`: the layout's own if they fit, else new ones."""
        if self.lists is not None and self.lists.fit(self.r.shape[0], queries, keys):
            return self.lists
        return tile_lists(self.r, self.index, self.key_r, self.key_index, length=queries, key_length=keys)

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise ValueError unless q [b, h, s_q, d] and k, v [b, g, s_k, d] fit this layout and h is a multiple of g."""
        shapes = f"q is {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape or q.shape[3] != k.shape[3]:
            raise ValueError(f"{shapes}; they must be [b, h, s_q, d] and, k and v alike, [b, g, s_k, d]")
        got = (q.shape[0], q.shape[2], k.shape[2])
        if got != self.shape or k.shape[0] != q.shape[0]:
            raise ValueError(f"{shapes}, so the layout must be for (b, s_q, s_k) = {got}; it is for {self.shape}")
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise ValueError(f"{shapes}; the {q.shape[1]} query heads must be a multiple of the {k.shape[1]} key heads")

    def plan(self, prepare: Callable[[AttentionLayout, AttentionCase], Any], case: AttentionCase) -> Any:
        """What a backend's `prepare` makes of this layout in this case: made at the first call, then kept.

        Raises:
            ValueError: labels or places were changed in place since; a plan would belong to what they were.
        """
        versions = self._current_versions()
        if not self._plans:
            self._versions = versions
        elif versions != self._versions:
            raise ValueError("the labels of this layout were changed in place: make a new AttentionLayout of them")
        if (prepare, case) not in self._plans:
            self._plans[prepare, case] = prepare(self, case)
        return self._plans[prepare, case]

    def _current_versions(self) -> tuple[int, ...]:
        tensors = (self.r, self.index, self.key_r, self.key_index)
        # Tensors made in inference mode do not count their changes.
        return tuple(tensor._version for tensor in tensors if tensor is not None and not tensor.is_inference())
