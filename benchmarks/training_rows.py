"""Rows for benchmarks of training: one structure, random words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import TAG_IDS, WORD, make_ids
from megatron_multiverse.kernels.structure_scan import structure_scan_reference
from megatron_multiverse.training.microbatches import Microbatch


class PackedRows:
    """A `Loader` of rows of one structure with random words: microbatch number n depends on n alone.

    Args:
        case: name of the structure.
        tokens: length of a row.
        words: ids of words lie below.
        rank: data parallel rank.
        size: data parallel size.
    """

    tag_ids: tuple[int, ...] = TAG_IDS

    def __init__(self, case: str, tokens: int, words: int, rank: int, size: int) -> None:
        self._ids, documents = make_ids(case, tokens + 1)  # one more, for the last label
        self._documents = documents.clamp(max=tokens)
        scan = structure_scan_reference(self._ids[:, :-1], self._documents, torch.tensor(TAG_IDS))
        self._position_ids, self._r = scan.position_ids, scan.r
        self._words, self._rank, self._size, self._number = words, rank, size, 0

    def __iter__(self) -> Iterator[Microbatch]:
        while True:
            generator = torch.Generator().manual_seed(self._number * self._size + self._rank)
            self._number += 1
            ids = torch.where(self._ids == WORD, self.draw_words(generator), self._ids)
            yield {
                "input_ids": ids[:, :-1],
                "labels": ids[:, 1:],
                "loss_mask": (self._ids[:, 1:] == WORD).float(),
                "position_ids": self._position_ids,
                "r": self._r,
                "documents": self._documents,
                "sample_ids": torch.zeros(self._documents.shape[:2], dtype=torch.int64),
                "malformed": torch.zeros(self._documents.shape[:2], dtype=torch.bool),
            }

    def draw_words(self, generator: torch.Generator) -> Tensor:
        """A word for every token of a row, int64 [1, tokens + 1]."""
        return torch.randint(0, self._words, self._ids.shape, generator=generator)

    def sample_name(self, sample_id: int) -> str:
        """All rows have the same structure."""
        return "the row of the benchmark"

    def sample_problem(self, sample_id: int) -> str | None:
        """It has none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """How many rows all data parallel ranks together have handed out."""
        return {"rows": self._number * self._size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there, with any number of ranks that divides it."""
        self._number = state["rows"] // self._size
