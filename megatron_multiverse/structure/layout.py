"""Positions, visibility and loss of a sample: the one definition that data, training and serving share.

Positions. With g the position of `</Goal>`, the first token of every path (its gap newline) has position g + 1;
inside a path positions count up; the first token behind the last `</Path>` has the largest position of any
`</Path>` + 1. Nested blocks are resolved first. Packed documents restart at 0.

Visibility. Query i sees key j iff j is not later than i and no block holds them in different paths. A sample is a
series-parallel order, so one integer label per token decides it at any depth::

    r(i) = i + sum over the blocks around i of [(E - e) - (s - S)]      [S, E) path region, [s, e) the path of i
    visible(i, j) = j <= i and r(j) <= r(i)

r is the rank of a token when the siblings of every block stand in reverse order: a token of a later sibling has the
larger index but the smaller r, so neither sees the other. Packed documents are siblings of one outer block.

Both numbers are `index + constant` on each segment between structural borders, which is how they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_multiverse.structure.document import BlockSpan, Document

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a sample, or of a pack of samples, stand.

    Attributes:
        num_tokens: N.
        segments: int64 [S, 3], rows (first index, position - index, r - index), first indices increasing.
        forced: int64 [F, 2], half-open index ranges that the engine writes instead of sampling.
        breaks: int64 [B], indices whose predecessor in the sequence is not their predecessor in the tree.
        prompts: int64 [D, 2], half-open index ranges of the prompts (one per document).
        num_visible_pairs: number of (query, key) pairs with the key visible, the query itself included.
    """

    num_tokens: int
    segments: IntArray
    forced: IntArray
    breaks: IntArray
    prompts: IntArray
    num_visible_pairs: int

    def _expand(self, column: int) -> npt.NDArray[np.int32]:
        starts = self.segments[:, 0]
        lengths = np.diff(starts, append=self.num_tokens)
        shifts = np.repeat(self.segments[:, column], lengths)
        return (np.arange(self.num_tokens) + shifts).astype(np.int32)

    @property
    def position_ids(self) -> npt.NDArray[np.int32]:
        """Position of every token, shape [N]."""
        return self._expand(1)

    @property
    def r(self) -> npt.NDArray[np.int32]:
        """Visibility label of every token, shape [N], all different."""
        return self._expand(2)

    def loss_mask(self, *, train_forced_tokens: bool = False) -> BoolArray:
        """True where the token is trained as a target, shape [N].

        Prompt tokens and tokens whose predecessor in the sequence is not the one in the tree never are; tokens
        the engine forces (gap newline, `<Path>`, newline and label, newline and `<Conclusion>`) only on request:
        with its siblings hidden a path cannot know its own number.
        """
        mask = np.ones(self.num_tokens, dtype=np.bool_)
        mask[self.breaks] = False
        for start, end in self.prompts:
            mask[start:end] = False
        if not train_forced_tokens:
            for start, end in self.forced:
                mask[start:end] = False
        return mask


class _Builder:
    """Walks the tree once and collects segments, forced ranges and breaks."""

    def __init__(self) -> None:
        self.segments: list[tuple[int, int, int]] = []
        self.forced: list[tuple[int, int]] = []
        self.breaks: list[int] = []
        self.hidden_pairs = 0

    def text(self, start: int, end: int, blocks: list[BlockSpan], position_shift: int, r_shift: int) -> int:
        """Lay out [start, end) with its blocks; returns the position behind its last token."""
        cursor = start
        for block in blocks:
            if not block.paths:
                continue
            region_start, region_end = block.goal_end, block.region_end
            self.segments.append((cursor, position_shift, r_shift))
            anchor = region_start + position_shift
            longest = self._paths(block, anchor, r_shift)
            position_shift = longest - region_end
            cursor = region_end
            if cursor < end:
                self.breaks.append(cursor)
        self.segments.append((cursor, position_shift, r_shift))
        return end + position_shift

    def _paths(self, block: BlockSpan, anchor: int, r_shift: int) -> int:
        region_start, region_end = block.goal_end, block.region_end
        longest, pairs = anchor, (region_end - region_start) ** 2
        for k, path in enumerate(block.paths):
            r = r_shift + (region_end - path.end) - (path.start - region_start)
            longest = max(longest, self.text(path.start, path.end, path.blocks, anchor - path.start, r))
            pairs -= (path.end - path.start) ** 2
            self.forced.append((path.start, path.forced_end))
            if k > 0:
                self.breaks.append(path.start)
        self.hidden_pairs += pairs // 2
        if block.forced_end >= 0:
            self.forced.append((region_end, block.forced_end))
        return longest


def lay_out(document: Document) -> Layout:
    """Positions, visibility labels and loss ranges of one sample."""
    builder = _Builder()
    n = document.num_tokens
    builder.text(0, n, document.blocks, 0, 0)
    segments = [
        row
        for row, behind in zip(builder.segments, [*builder.segments[1:], (n, 0, 0)], strict=True)
        if row[0] < behind[0]
    ]
    return Layout(
        num_tokens=n,
        segments=np.array(segments, dtype=np.int64).reshape(-1, 3),
        forced=np.array(builder.forced, dtype=np.int64).reshape(-1, 2),
        breaks=np.array(builder.breaks, dtype=np.int64),
        prompts=np.array([[0, document.prompt_length]], dtype=np.int64),
        num_visible_pairs=n * (n + 1) // 2 - builder.hidden_pairs,
    )


def padding_layout(num_tokens: int) -> Layout:
    """A document without targets, for the padding behind a pack."""
    return lay_out(Document(num_tokens, prompt_length=num_tokens))


def pack_layouts(layouts: Sequence[Layout]) -> Layout:
    """The layout of documents that stand one behind the other and never see each other."""
    starts = np.concatenate(([0], np.cumsum([part.num_tokens for part in layouts])))
    total = int(starts[-1])
    segments = []
    for start, end, part in zip(starts[:-1], starts[1:], layouts, strict=True):
        # A document is a branch of one outer block that never joins: S = 0, E = total, [s, e) = the document.
        segments.append(part.segments + np.array([start, -start, (total - end) - start]))
    return Layout(
        num_tokens=total,
        segments=np.concatenate(segments),
        forced=np.concatenate([part.forced + start for start, part in zip(starts[:-1], layouts, strict=True)]),
        breaks=np.concatenate([part.breaks + start for start, part in zip(starts[:-1], layouts, strict=True)]),
        prompts=np.concatenate([part.prompts + start for start, part in zip(starts[:-1], layouts, strict=True)]),
        num_visible_pairs=sum(part.num_visible_pairs for part in layouts),
    )


def visible_matrix(layout: Layout) -> BoolArray:
    """The mask written out, [N, N], True where query (row) sees key (column): for tests and pictures only."""
    index, r = np.arange(layout.num_tokens), layout.r
    return (index[None, :] <= index[:, None]) & (r[None, :] <= r[:, None])
