"""Memory goes to another tensor only when nothing uses it any more."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_multiverse.checkpoints import recycled


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycled, "_LARGE", 1)


def test_no_tensor_shares_memory_with_another_one_that_lives() -> None:
    draw = random.Random(0)
    with recycled.recycling():
        alive: list[tuple[torch.Tensor, torch.Tensor]] = []
        places = set()
        for _ in range(300):
            dtype = draw.choice([torch.bfloat16, torch.float32, torch.int64])
            shape = (draw.randint(1, 40), draw.randint(1, 40))
            tensor = recycled.empty(shape, dtype)
            assert tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.is_contiguous()
            places.add(tensor.data_ptr())
            tensor.copy_(torch.randint(0, 100, shape))
            kept = tensor.t() if draw.random() < 0.5 else tensor  # a view keeps the memory as well
            alive.append((kept, kept.clone()))
            del tensor, kept
            if len(alive) > 4:
                alive.pop(draw.randrange(4))
            assert all(torch.equal(now, then) for now, then in alive)
        assert len(places) < 150  # memory was used again


def test_nothing_is_kept_when_no_conversion_runs() -> None:
    with recycled.recycling():
        del_me = recycled.empty((1000,), torch.float32)
        outlives = recycled.empty((2000,), torch.float32)
        del del_me
        assert [len(block) for block in recycled._free] == [4000]
    assert not recycled._free
    del outlives
    assert not recycled._free
    assert recycled.empty((10,), torch.float32).untyped_storage().resizable()  # torch's own memory


def test_contiguous_copies_only_where_it_must() -> None:
    matrix = torch.arange(12.0).view(3, 4)
    assert recycled.contiguous(matrix) is matrix
    assert torch.equal(recycled.contiguous(matrix.t()), matrix.t()) and recycled.contiguous(matrix.t()).is_contiguous()
    assert torch.equal(recycled.contiguous(matrix, torch.bfloat16), matrix.bfloat16())
