"""Blocks that take more steps than they save are turned back into text.

A block pays with its goal, its conclusion, its tags and the line that announces it for writing its paths side by side.
Of the blocks in published Multiverse trajectories many do not win that back: they are two short paths each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_multiverse.curation.token_counts import TokenCounter, tree_document
from megatron_multiverse.curation.trees import ANNOUNCEMENT, flatten, walk
from megatron_multiverse.structure import Block, Document, Parts, measure_blocks


@dataclass(frozen=True)
class BlockGain:
    """What a block saves."""

    block: Block
    depth: int
    sequential_tokens: int
    """Steps if its paths were plain text; blocks in them stay."""
    critical_tokens: int
    """Steps of the block, with the line that announces it."""

    @property
    def net_gain(self) -> float:
        """sequential_tokens / critical_tokens; a block pays above 1."""
        return self.sequential_tokens / self.critical_tokens


def block_gains(parts: Sequence[str | Block], document: Document, counter: TokenCounter) -> list[BlockGain]:
    """The gain of each block, outer before inner, in text order.

    Args:
        parts: a tree.
        document: what `tree_document` makes of it.
        counter: the tokens to count.
    """
    announcement = counter.document(ANNOUNCEMENT + "\n").num_tokens
    measured = measure_blocks(document)
    return [
        BlockGain(block, row.depth, row.sequential_tokens, row.critical_tokens + announcement)
        for (_, block), row in zip(walk(parts), measured, strict=True)
    ]


def losing_blocks(parts: Sequence[str | Block], counter: TokenCounter, min_net_gain: float) -> dict[int, BlockGain]:
    """The blocks that gain less than `min_net_gain` and hold no such block: once those are text, they look different.

    Args:
        parts: a tree.
        counter: the tokens to count.
        min_net_gain: 0 lets every block pass.

    Returns:
        By index in the order of `walk`.
    """
    gains = block_gains(parts, tree_document(parts, counter), counter) if min_net_gain > 0 else []
    losing = {id(gain.block): k for k, gain in enumerate(gains) if gain.net_gain < min_net_gain}
    return {
        k: gains[k]
        for k in losing.values()
        if not any(id(inner) in losing for path in gains[k].block.paths for _, inner in walk(path))
    }


def flatten_losing(parts: Sequence[str | Block], counter: TokenCounter, min_net_gain: float) -> tuple[Parts, list[int]]:
    """Turn every block that does not pay into the text of its paths.

    Inner blocks are judged first. That is the shortest critical path that leaving out blocks can reach when
    `min_net_gain` is 1, since a shorter path never makes the block around it longer.

    Returns:
        The tree, and the indices, in the order of `walk` over `parts`, of the blocks that are left.
    """
    left = list(range(sum(1 for _ in walk(parts))))
    while losing := losing_blocks(parts, counter, min_net_gain):
        parts = flatten(parts, losing)
        left = [index for k, index in enumerate(left) if k not in losing]
    return tuple(parts), left
