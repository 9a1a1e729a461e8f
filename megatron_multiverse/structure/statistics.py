"""How parallel a sample is, and whether the structure pays for itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_multiverse.structure.document import BlockSpan, Document, PathSpan
from megatron_multiverse.structure.layout import lay_out


@dataclass(frozen=True)
class Statistics:
    """Counts over the response of one sample; all lengths in tokens."""

    num_tokens: int
    """Tokens of the response."""
    blocks: int
    paths: int
    depth: int
    """Deepest nesting of blocks; 0 without a block."""
    path_tokens: int
    """Tokens inside paths, nested blocks included."""
    plain_tokens: int
    """Tokens of the response without tags, goals and conclusions."""
    critical_tokens: int
    """Length of the longest chain of tokens that must follow one another: the steps a parallel decoder needs."""

    @property
    def in_path_share(self) -> float:
        """path_tokens / num_tokens."""
        return self.path_tokens / max(self.num_tokens, 1)

    @property
    def num_parallel(self) -> float:
        """num_tokens / critical_tokens. Tags, outlines and conclusions count as output here."""
        return self.num_tokens / max(self.critical_tokens, 1)

    @property
    def net_gain(self) -> float:
        """plain_tokens / critical_tokens. Below 1 the structure takes more steps than writing the same text
        sequentially would."""
        return self.plain_tokens / max(self.critical_tokens, 1)


def acceleration_ratio(num_tokens: npt.NDArray[np.float64], critical_tokens: npt.NDArray[np.float64]) -> float:
    """Mean over answers of their tokens over those of their longest chain; 1 where nothing was parallel. What papers
    quote as acceleration (1.53x).

    Args:
        num_tokens: [answers], at least one.
        critical_tokens: [answers], of the longest chains.
    """
    return float(np.mean(num_tokens / np.maximum(1, critical_tokens)))


def saved_share(num_tokens: npt.NDArray[np.float64], critical_tokens: npt.NDArray[np.float64]) -> float:
    """Mean over answers of the share of their tokens that took no step of their own, 1 - critical tokens / tokens; 0
    where nothing was parallel. ThreadWeaver's eta, which its code logs as acceleration_ratio (arXiv 2512.07843).

    Args:
        num_tokens: [answers], at least one.
        critical_tokens: [answers], of the longest chains.
    """
    return float(np.mean((num_tokens - critical_tokens) / np.maximum(1, num_tokens)))


def measure(document: Document) -> Statistics:
    """Measure the response of one sample."""
    num_tokens = document.num_tokens - document.prompt_length
    layout = lay_out(document)
    end_position = int(layout.position_ids[-1]) + 1 if document.num_tokens else 0
    blocks = list(document.walk())
    return Statistics(
        num_tokens=num_tokens,
        blocks=len(blocks),
        paths=sum(len(block.paths) for _, block in blocks),
        depth=max((depth for depth, _ in blocks), default=0),
        path_tokens=sum(block.region_end - block.goal_end for block in document.blocks),
        plain_tokens=num_tokens - sum(_structure_tokens(block) for _, block in blocks),
        critical_tokens=end_position - document.prompt_length,
    )


@dataclass(frozen=True)
class BlockStatistics:
    """Counts over one block; all lengths in tokens."""

    depth: int
    """1 = outermost."""
    paths: int
    sequential_tokens: int
    """Steps if its paths were plain text, without tags and labels, one after the other; blocks in them stay."""
    critical_tokens: int
    """Steps of a parallel decoder from `<Parallel>` to `</Parallel>`."""


def measure_blocks(document: Document) -> list[BlockStatistics]:
    """Measure each complete block, outer before inner, in text order."""
    if not document.num_tokens:
        return []
    positions = lay_out(document).position_ids

    def steps(start: int, end: int) -> int:
        return int(positions[end - 1] - positions[start]) + 1

    return [
        BlockStatistics(
            depth,
            len(block.paths),
            sum(steps(path.forced_end, path.end - 1) for path in block.paths if path.forced_end < path.end - 1),
            steps(block.start, block.end),
        )
        for depth, block in document.walk()
        if block.end >= 0
    ]


def _structure_tokens(block: BlockSpan) -> int:
    """Tokens of one block, without those of inner blocks, that the same text written sequentially would not have."""
    goal = block.goal_end - block.start
    conclusion = block.end - block.region_end
    return goal + conclusion + sum(_path_tags(path) for path in block.paths)


def _path_tags(path: PathSpan) -> int:
    return min(4, path.end - path.start)  # gap newline, <Path>, newline before the label, </Path>
