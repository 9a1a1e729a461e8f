"""Positions, visibility and loss of a sample: the one definition that data, training and serving share.

Positions. Let g be the position of `</Goal>`. The first token of every path (its gap newline) has position g + 1, and
inside a path positions count up. The first token after the last `</Path>` has the largest position of any `</Path>`,
plus 1. Nested blocks are resolved first. Each document of a pack starts at 0 again.

Visibility. Query i sees key j iff j is not later than i and no block holds them in different paths. The tokens of a
sample form a series-parallel order, so one integer label r per token decides this at any depth::

    r(i) = i + sum over the blocks around i of [(E - e) - (s - S)]      [S, E) path region, [s, e) the path of i
    visible(i, j) = j <= i and r(j) <= r(i)

r is the rank of a token when the paths of every block are read in reverse order. Of two tokens in sibling paths, the
one in the later path has the larger index but the smaller r, so neither sees the other. Packed documents are paths of
one outer block that never joins.

Position and r are `index + constant` on each segment between two borders (a `</Goal>` or a `</Path>`), which is how
they are stored.
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
        segments: int64 [S, 3], one row (first index, position - index, r - index) per segment, in text order.
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

        Never trained are prompt tokens, and tokens whose predecessor in the sequence is not their predecessor in the
        tree. Tokens that the engine writes (gap newline, `<Path>`, newline and label, newline and `<Conclusion>`) are
        trained only on request: a path does not see its siblings, so it cannot know its own number.
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
    """Walks the tree of blocks and paths once and collects segments, forced ranges, breaks and hidden pairs."""

    def __init__(self) -> None:
        self.segments: list[tuple[int, int, int]] = []
        self.forced: list[tuple[int, int]] = []
        self.breaks: list[int] = []
        self.hidden_pairs = 0

    def text(self, start: int, end: int, blocks: list[BlockSpan], position_shift: int, r_shift: int) -> int:
        """Lay out tokens [start, end) with their blocks; returns the position that would follow the last token.

        `position_shift` and `r_shift` are position - index and r - index at `start`. Every block that is passed leaves
        r_shift as it was, and changes position_shift: its region counts as its longest path alone.
        """
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
            # What follows the last </Path> in the text follows all paths in the tree.
            if cursor < end:
                self.breaks.append(cursor)
        self.segments.append((cursor, position_shift, r_shift))
        return end + position_shift

    def _paths(self, block: BlockSpan, anchor: int, r_shift: int) -> int:
        """Lay out the paths of a block, each from position `anchor` on; returns the position after the longest."""
        region_start, region_end = block.goal_end, block.region_end
        # Hidden are the pairs of tokens in different paths: all pairs of the region less those inside a path, halved.
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
    # A segment is empty where the text ends with the last </Path> of a block that was cut off.
    following = [*builder.segments[1:], (n, 0, 0)]
    segments = [row for row, after in zip(builder.segments, following, strict=True) if row[0] < after[0]]
    return Layout(
        num_tokens=n,
        segments=np.array(segments, dtype=np.int64).reshape(-1, 3),
        forced=np.array(builder.forced, dtype=np.int64).reshape(-1, 2),
        breaks=np.array(builder.breaks, dtype=np.int64),
        prompts=np.array([[0, document.prompt_length]], dtype=np.int64),
        num_visible_pairs=n * (n + 1) // 2 - builder.hidden_pairs,
    )


def padding_layout(num_tokens: int) -> Layout:
    """A document without targets, for the padding at the end of a pack."""
    return lay_out(Document(num_tokens, prompt_length=num_tokens))


def pack_layouts(layouts: Sequence[Layout]) -> Layout:
    """The layout of documents that stand one after the other in a row and never see each other."""
    starts = np.concatenate(([0], np.cumsum([part.num_tokens for part in layouts])))
    total = int(starts[-1])
    segments = []
    for start, end, part in zip(starts[:-1], starts[1:], layouts, strict=True):
        # A document is a path of one outer block that never joins: S = 0, E = total, [s, e) = the document.
        segments.append(part.segments + np.array([start, -start, (total - end) - start]))
    return Layout(
        num_tokens=total,
        segments=np.concatenate(segments),
        forced=np.concatenate([part.forced + start for start, part in zip(starts[:-1], layouts, strict=True)]),
        breaks=np.concatenate([part.breaks + start for start, part in zip(starts[:-1], layouts, strict=True)]),
        prompts=np.concatenate([part.prompts + start for start, part in zip(starts[:-1], layouts, strict=True)]),
        num_visible_pairs=sum(part.num_visible_pairs for part in layouts),
    )


def share_prefix(layouts: Sequence[Layout], prefix: int) -> Layout:
    """The layout of documents with the same beginning, which stands there once, followed by the rest of each.

    What follows the prefix in each document is a path of one block that never joins, so every token has the position it
    had and sees the tokens it saw. That is the layout of several answers to one prompt.

    Args:
        layouts: of the documents alone; at least one.
        prefix: tokens that they share, all of them part of their prompts; at least one.
    """
    shifts = np.cumsum([0, *(part.num_tokens - prefix for part in layouts)]).tolist()
    segments, breaks = [np.zeros((1, 3), dtype=np.int64)], []
    total = prefix + shifts.pop()
    for shift, part in zip(shifts, layouts, strict=True):
        own = part.segments.copy()
        own[:, 0] = np.maximum(own[:, 0], prefix)
        own = own[np.diff(own[:, 0], append=part.num_tokens) > 0]  # of those that begin in the prefix the last counts
        # A path [s, e) of a block [S, E), where S is the end of the prefix, s = S + shift and E the end of all.
        segments.append(own + np.array([shift, -shift, (total - part.num_tokens - shift) - shift]))
        breaks.append(part.breaks + shift if shift == 0 else np.append(prefix, part.breaks) + shift)
    own_pairs = prefix * (prefix + 1) // 2
    return Layout(
        num_tokens=total,
        segments=np.concatenate(segments),
        forced=np.concatenate([part.forced + shift for shift, part in zip(shifts, layouts, strict=True)]),
        breaks=np.concatenate(breaks),
        prompts=np.array([[0, prefix]], dtype=np.int64),
        num_visible_pairs=own_pairs + sum(part.num_visible_pairs - own_pairs for part in layouts),
    )


def visible_matrix(layout: Layout) -> BoolArray:
    """The mask written out, [N, N], True where the query (row) sees the key (column). For tests and pictures only."""
    index, r = np.arange(layout.num_tokens), layout.r
    return (index[None, :] <= index[:, None]) & (r[None, :] <= r[:, None])
