"""Where the blocks and paths of a sample stand, as half-open spans [start, end) of token indices.

Every token of a block's path region belongs to exactly one path: a path begins with the newline after `</Goal>`, or
after the `</Path>` of the path before it, and ends with its own `</Path>`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class PathSpan:
    """One path of a block."""

    start: int
    """Index of its first token, the gap newline: the token after `</Goal>` or after the previous `</Path>`."""
    end: int
    """Index after `</Path>`."""
    forced_end: int
    """Index after the label. The engine writes tokens [start, forced_end), the model does not choose them."""
    label: str = ""
    """The label as written, e.g. ``2.1:``; empty if the path has none."""
    blocks: list[BlockSpan] = field(default_factory=list)
    """Blocks nested in the path, in text order."""


@dataclass
class BlockSpan:
    """One block, from `<Parallel>` to `</Parallel>`. Its path region is [goal_end, region_end)."""

    start: int
    """Index of `<Parallel>`."""
    goal_end: int = -1
    """Index after `</Goal>`, where the first path starts; -1 while the goal is open."""
    paths: list[PathSpan] = field(default_factory=list)
    forced_end: int = -1
    """Index after `<Conclusion>`. The engine writes tokens [region_end, forced_end). -1 without a conclusion."""
    end: int = -1
    """Index after `</Parallel>`; -1 while the block is open."""

    @property
    def region_end(self) -> int:
        """Index after the last `</Path>`."""
        return self.paths[-1].end


@dataclass
class Document:
    """The structure of one sample: tokens [0, prompt_length) are the prompt, the others the response."""

    num_tokens: int
    prompt_length: int = 0
    blocks: list[BlockSpan] = field(default_factory=list)
    """Outermost blocks, in text order; inner ones hang at their paths."""
    malformed: Counter[str] = field(default_factory=Counter)
    """How often each rule of the grammar was broken (tolerant parsing only)."""

    def walk(self) -> Iterator[tuple[int, BlockSpan]]:
        """Every block with its depth (1 = outermost), outer before inner, in text order."""
        stack = [(1, block) for block in reversed(self.blocks)]
        while stack:
            depth, block = stack.pop()
            yield depth, block
            inner = [(depth + 1, child) for path in block.paths for child in path.blocks]
            stack.extend(reversed(inner))
