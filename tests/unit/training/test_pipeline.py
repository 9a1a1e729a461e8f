"""Every rank lays a microbatch out once, whatever number of chunks of the model it has."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_multiverse.training import pipeline
from megatron_multiverse.training.pipeline import PlacedMicrobatches
from megatron_multiverse.training.placement import TokenPlacer

from .synthetic import SyntheticLoader


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_microbatch_is_laid_out_once_for_all_chunks(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """In the order of an interleaved pipeline: some microbatches through a chunk, then the same through the next."""
    monkeypatch.setattr(pipeline, "counts_for_its_model", lambda: True)
    placer, placed = TokenPlacer(SyntheticLoader(), torch.device("cpu"), "dense"), list[Tensor]()
    place = placer.place

    def noted(batch: Any, ids: Tensor) -> Any:
        placed.append(ids)
        return place(batch, ids)

    monkeypatch.setattr(placer, "place", noted)
    given = [SyntheticLoader().batch(number) for number in range(4)]
    batches = PlacedMicrobatches(given, placer, None, chunks)
    iterators = batches.iterators()
    assert len(iterators) == chunks and not placed
    pairs = 0
    for first in (0, 2):
        seen = [[next(iterator) for _ in range(2)] for iterator in iterators]
        assert all(one is other for others in seen for one, other in zip(seen[0], others, strict=True))
        assert [ids.tolist() for ids in placed[first:]] == [given[k]["input_ids"].tolist() for k in (first, first + 1)]
        pairs += sum(int(batch.params.num_visible_pairs()) for batch in seen[0])
        assert int(batches.visible_pairs) == pairs > 0
        held = weakref.ref(seen[0][0])
        del seen
        gc.collect()
        assert held() is None, "nobody needs it any more"
