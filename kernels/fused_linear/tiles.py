"""Tile sizes of the products of few rows, see `triton_skinny.py`."""

from __future__ import annotations

import functools
from typing import NamedTuple

LONGEST_STRETCH = 9216
"""Of a sum, for one program: with two of 13,824 for the down projection of Qwen2.5-32B a step takes 2 % longer than
with three of 9,216, with two of 9,472 for that of 7B 1 % longer than with three (engine_parts_h200.json)."""


class ProductShape(NamedTuple):
    """What the tiles of a product depend on."""

    depth: int
    """Numbers that each sum adds up."""
    width: int
    """Outputs."""
    swiglu: bool
    """See `triton_skinny.skinny_linear`."""
    parted: bool
    """See `triton_skinny.prepare_product`."""
    lanes: int
    """Rows of x, rounded up."""
    itemsize: int
    """Bytes of a weight."""


TILES: dict[ProductShape, dict[str, int]] = {}
"""Tiles in place of those of `choose_tiles`, for searches (benchmarks/tune_tiles.py) and other GPUs."""


@functools.cache
def choose_tiles(shape: ProductShape) -> dict[str, int]:
    """Tile sizes of a shape: those that make a whole decode step shortest (benchmarks/results/decode_tiles_h200.md)."""
    depth, width, swiglu, parted, lanes, itemsize = shape
    rows = width * (2 if swiglu else 1)
    if itemsize == 1:
        # 64 rows are the least that tensor cores take from shared memory as they are.
        splits = 1 if rows >= 8192 else max(1, min(depth // 1024, round(264 / -(-rows // 64))))
        sizes = {"BLOCK_OUT": 64, "BLOCK_K": 256, "SPLITS": splits, "PREFETCH": 256}
        return sizes | {"num_warps": 4, "num_stages": 4 if lanes == 8 else 3}
    splits = 1
    if swiglu:
        # Few tiles in flight: of all that were tried, with 3 whole steps are the shortest or nearly so.
        tile, warps, stages = (64, 128), 4, 3
    elif rows >= 8192:
        tile, warps, stages = (64, 128), 4, 4
    elif parted and lanes == 16 and depth >= 4096 and rows < 2048:
        # As deep and narrow as the down projection of Qwen2.5-1.5B: somewhat fewer programs than multiprocessors.
        tile, warps, stages = (128, 128), 4, 4
        splits = max(1, min(depth // 512, 120 // -(-rows // 128)))
    elif rows >= 4096 or (parted and (lanes == 16 or (depth < 4096) == (rows < 2048))):
        # Somewhat more programs than multiprocessors. With 17 to 32 rows of x this is for sums that are neither as deep
        # and narrow as the down projection of Qwen2.5-1.5B nor as flat and wide as the output projection of 7B.
        tile, warps, stages = (64, 128), 4, 4
        splits = max(1, -(-depth // LONGEST_STRETCH), min(depth // 512, round(150 / -(-rows // 64))))
    elif lanes > 16 and depth < 2048 and not parted:
        # As flat as the qkv projection of Qwen2.5-1.5B.
        tile, warps, stages = (32, 256), 2, 4
    elif lanes > 16 and (depth < 4096 or rows < 2048):
        tile, warps, stages = (64, 256), 8, 3
        splits = 2 if depth < 4096 else 5 if parted else 4
    else:
        # About 230 programs, nearly two for every multiprocessor.
        tile = (64 if rows >= 2048 else 32, 128)
        splits = max(1, min(depth // 512, round(230 / -(-rows // tile[0]))))
        warps, stages = 4, 4 if tile[0] == 64 else 5
    sizes = dict(zip(("BLOCK_OUT", "BLOCK_K"), tile, strict=True))
    prefetch = 512 if depth < 2048 and not swiglu else 256
    return sizes | {"SPLITS": splits, "num_warps": warps, "num_stages": stages, "PREFETCH": prefetch}
