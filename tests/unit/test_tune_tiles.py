"""The search for tiles finds the best of a made-up machine, and the products take what it tries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import pytest
import torch

from benchmarks.tune_tiles import NAMES, Name, Options, Tiles, main, neighbours, products, search
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.fused_linear.tiles import TILES, ProductShape, choose_tiles
from megatron_multiverse.model.families import preset

SMALL = products(preset("qwen2.5-1.5b"), 1)


def start_of(names: Mapping[Name, ProductShape]) -> dict[ProductShape, Tiles]:
    return {product: tuple(choose_tiles(product)[name] for name in NAMES) for product in names.values()}


def test_a_search_finds_the_tiles_that_a_machine_likes_best() -> None:
    start = start_of(SMALL)
    likes = {SMALL["gate_up"]: (32, 128, 1, 5, 8, 0), SMALL["down"]: (64, 64, 8, 2, 4, 512)}
    said: list[float] = []

    def measure(tiles: Mapping[ProductShape, Tiles]) -> float:
        return 1.0 + sum(mine != best for p, liked in likes.items() for mine, best in zip(tiles[p], liked, strict=True))

    best, shortest = search(
        measure, list(likes), start, has_time=lambda: True, say=lambda *what: said.append(float(what[2]))
    )
    assert best == start | likes and shortest == 1.0
    assert said == sorted(said, reverse=True) and said[-1] == 1.0


def test_what_a_machine_cannot_run_or_was_fast_once_is_not_taken() -> None:
    start, times = start_of(SMALL), iter([2.0, 2.0])

    def measure(tiles: Mapping[ProductShape, Tiles]) -> float:
        if tiles == start:
            return next(times)
        if (key := str(tiles)) in seen:
            return 2.0
        seen.add(key)
        return 1.0 if len(seen) % 2 else float("inf")

    seen: set[str] = set()
    best, shortest = search(measure, list(SMALL.values()), start, has_time=lambda: True, say=lambda *what: None)
    assert len(seen) > 100
    assert best == start and shortest == 2.0


def test_without_time_left_the_tiles_stay() -> None:
    start = start_of(SMALL)
    found = search(lambda _: 1.0, [SMALL["down"]], start, has_time=lambda: False, say=lambda *what: None)
    assert found == (start, 1.0)


@pytest.mark.parametrize("name", get_args(Name))
def test_tiles_that_are_tried_fit_and_change_only_their_group(name: Name) -> None:
    product = SMALL[name]
    tiles = start_of(SMALL)[product]
    for other in neighbours(tiles, product, (0, 2)):
        assert [a for a, b in zip(other, tiles, strict=True) if a != b]
        assert (other[1], *other[3:]) == (tiles[1], *tiles[3:])
        assert (other[0] + 16) * other[1] * 2 * other[3] <= 227 * 1024
        assert other[2] == 1 or name in ("down", "qkv", "output")


def test_products_are_launched_with_the_tiles_of_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_skinny = pytest.importorskip("megatron_multiverse.kernels.fused_linear.triton_skinny")
    x, weight = torch.zeros(3, 512, dtype=torch.bfloat16), torch.zeros(768, 512, dtype=torch.bfloat16)
    shape = ProductShape(512, 768, False, True, 16, 2)

    def prepare() -> tuple[tuple[int, int], dict[str, int]]:
        product = triton_skinny.prepare_product(x, weight, bias=None, scale=None, pdl=False, blocks=None, parted=True)
        return product.grid, {name: product.options[name] for name in NAMES}

    assert prepare()[1] == choose_tiles(shape)
    tiles = dict(zip(NAMES, (128, 64, 4, 3, 8, 0), strict=True))
    monkeypatch.setitem(TILES, shape, tiles)
    assert prepare() == ((6, 4), tiles)


def test_more_rows_than_the_products_take_and_machines_without_a_gpu_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"batch must be 1 to 32.* got 33"):
        Options(batch=33)
    monkeypatch.setattr("sys.argv", ["tune_tiles"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="CUDA GPU"):
        main()
