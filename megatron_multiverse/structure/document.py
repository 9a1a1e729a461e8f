"""Where the blocks and paths of a token sequence stand: half-open spans over token indices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class PathSpan:
    """One path. `start` is its gap newline (the token behind `</Goal>` or the previous `</Path>`)."""

    start: int
    """Index of the first token of the path: the gap newline."""
    end: int
    """Index behind `</Path>`."""
    forced_end: int
    """Index behind the label: the engine writes tokens [start, forced_end)."""
    label: str = ""
    """Label as written, e.g. ``2.1:``; empty if the path has none."""
    blocks: list[BlockSpan] = field(default_factory=list)


@dataclass
class BlockSpan:
    """One `<Parallel>` block; its path region is [goal_end, region_end)."""

    start: int
    """Index of `<Parallel>`."""
    goal_end: int = -1
    """Index behind `</Goal>`: the first path starts here."""
    paths: list[PathSpan] = field(default_factory=list)
    forced_end: int = -1
    """Index behind `<Conclusion>`: the engine writes tokens [region_end, forced_end). -1 without one."""
    end: int = -1
    """Index behind `</Parallel>`."""

    @property
    def region_end(self) -> int:
        """Index behind the last `</Path>`."""
        return self.paths[-1].end


@dataclass
class Document:
    """The structure of one sample: prompt tokens [0, prompt_length), then the response with its blocks."""

    num_tokens: int
    prompt_length: int = 0
    blocks: list[BlockSpan] = field(default_factory=list)
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
