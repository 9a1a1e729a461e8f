"""The mask of the official training code, in which one token leaks from each path to the later ones.

There (arXiv 2506.09991, code release, `train/utils.py`) a path reaches from `<Path>` through `</Path>`, so the newline
in the gap between two paths belongs to none: it sees the paths before it, and the paths after it see it. This is no
order of the tokens: path 2 sees the gap, the gap sees path 1, but path 2 does not see path 1. One label for each token
cannot express it, so ours gives the gap to the path that follows. Two labels can: what a token sees depends on the one
it has as a query, who sees it on the one it has as a key. For all tokens but those of the gaps both are the layout's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from positions import with_columns

from megatron_multiverse.data.sft_dataset import Sample
from megatron_multiverse.kernels.multiverse_attention import BACKENDS, AttentionCase, AttentionLayout
from megatron_multiverse.kernels.multiverse_attention.backends import AttentionBackend
from megatron_multiverse.structure import Document, Layout, pack_layouts, padding_layout
from megatron_multiverse.structure.document import BlockSpan

_BITS = 15
"""Of the label as a key, the lower part of that number. int32 has room for rows of 32,768 tokens."""


@dataclass(frozen=True)
class LeakySample(Sample):
    """A document whose `layout` has the labels as queries."""

    key_layout: Layout | None = None
    """The same with the labels as keys."""


def leaky(ids: npt.NDArray[np.int64], document: Document, layout: Layout) -> LeakySample:
    """A document under the official mask.

    Args:
        ids: int64 [N].
        document: its structure, every block of which is complete.
        layout: positions, loss and labels of ours.
    """
    r = layout.r.astype(np.int64)
    as_query, as_key = r.copy(), r.copy()

    def gaps(blocks: list[BlockSpan]) -> None:
        for block in blocks:
            assert block.region_end < document.num_tokens, "a block that was cut off has no conclusion"
            for path in block.paths:
                # It sees what the token behind the block sees, as far as that is earlier, and whoever sees the goal
                # sees it.
                as_query[path.start], as_key[path.start] = r[block.region_end], r[block.goal_end - 1]
                gaps(path.blocks)

    gaps(document.blocks)
    positions = layout.position_ids.astype(np.int64)
    return LeakySample(
        ids, with_columns(layout, positions, as_query), key_layout=with_columns(layout, positions, as_key)
    )


def both_labels(query_r: npt.NDArray[np.int32], samples: list[Sample]) -> npt.NDArray[np.int32]:
    """Both labels of each token of a pack as one number, int32 [S].

    Args:
        query_r: int32 [S], labels of the pack as queries.
        samples: `LeakySample`s of the pack in their order; padding follows.
    """
    assert len(query_r) <= 1 << _BITS, f"a row of {len(query_r)} tokens has no room for two labels in one number"
    layouts = [sample.key_layout for sample in samples if isinstance(sample, LeakySample) and sample.key_layout]
    missing = len(query_r) - sum(layout.num_tokens for layout in layouts)
    key_r = pack_layouts([*layouts, *([padding_layout(missing)] if missing else [])]).r
    return (query_r << _BITS) | key_r


@contextmanager
def two_labels() -> Iterator[None]:
    """While this is open, every attention backend takes labels as `both_labels` makes them."""
    own = dict(BACKENDS)
    BACKENDS.update({name: _splitting(backend) for name, backend in own.items()})
    try:
        yield
    finally:
        BACKENDS.update(own)


def _splitting(backend: AttentionBackend) -> AttentionBackend:
    """A backend that takes both labels as one number, by one that takes labels of queries and labels of keys."""

    def prepare(layout: AttentionLayout, case: AttentionCase) -> Any:
        index = torch.arange(layout.r.shape[1], dtype=torch.int32, device=layout.r.device)
        index = index.expand_as(layout.r).contiguous()
        split = AttentionLayout(layout.r >> _BITS, index, layout.r & ((1 << _BITS) - 1), index)
        return backend.prepare(split, replace(case, placed=True))

    return AttentionBackend(prepare, backend.attend, lambda case: backend.problem(replace(case, placed=True)))
