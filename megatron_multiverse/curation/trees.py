"""Trees of text and blocks: their plain text, their shape, and blocks turned back into text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from megatron_multiverse.structure import Block, Parts, Tag, parse_text, render

ANNOUNCEMENT = "Let's think in parallel."
"""The line before each block, as Multiverse-1K has it."""


def announce(parts: Sequence[str | Block]) -> Parts:
    """Put the announcement on a line of its own before each block."""
    found: list[str | Block] = []
    for part in parts:
        if isinstance(part, Block):
            found.append(ANNOUNCEMENT)
            part = replace(part, paths=tuple(announce(path) for path in part.paths))
        found.append(part)
    return merge(found)


def without_announcements(parts: Sequence[str | Block]) -> Parts:
    """The inverse of `announce`. The same line elsewhere in the text stays."""
    found: list[str | Block] = []
    for k, part in enumerate(parts):
        if isinstance(part, Block):
            found.append(replace(part, paths=tuple(without_announcements(path) for path in part.paths)))
        elif k + 1 < len(parts) and isinstance(parts[k + 1], Block) and part.endswith(ANNOUNCEMENT):
            text = part.removesuffix(ANNOUNCEMENT)
            if not text or text.endswith("\n"):
                part = text.removesuffix("\n")
            found += [part] if part else []
        else:
            found.append(part)
    return tuple(found)


def plain_text(parts: Sequence[str | Block]) -> str:
    """The text without structure: no tags, labels, outlines, conclusions and announcements."""
    return "\n".join(_texts(without_announcements(parts)))


def _texts(parts: Sequence[str | Block]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, str):
            yield part
        else:
            for path in part.paths:
                yield from _texts(path)


def walk(parts: Sequence[str | Block], depth: int = 1) -> Iterator[tuple[int, Block]]:
    """Every block with its depth (1 = outermost), outer before inner, in text order."""
    for part in parts:
        if isinstance(part, Block):
            yield depth, part
            for path in part.paths:
                yield from walk(path, depth + 1)


def flatten(parts: Sequence[str | Block], gone: Collection[int]) -> Parts:
    """Turn some blocks into the text of their paths; blocks inside of them stay unless they are named, too.

    Args:
        parts: a tree.
        gone: indices of blocks in the order of `walk`.
    """
    flat: Parts = dissolve(parts, {id(block) for k, (_, block) in enumerate(walk(parts)) if k in gone}, merge)
    return flat


def dissolve(parts: Sequence[Any], gone: Collection[int], join: Callable[[Sequence[Any]], tuple[Any, ...]]) -> Any:
    """`flatten` for trees of any kind.

    Args:
        parts: what stands between blocks, and blocks: dataclasses with `paths`.
        gone: `id` of the blocks that become the parts of their paths.
        join: joins neighbours that are no blocks.

    Returns:
        A tree of the same kind.
    """
    found: list[Any] = []
    for part in parts:
        if not hasattr(part, "paths"):
            found.append(part)
            continue
        paths = tuple(dissolve(path, gone, join) for path in part.paths)
        found += [inner for path in paths for inner in path] if id(part) in gone else [replace(part, paths=paths)]
    return join(found)


def shape(block: Block) -> tuple[object, ...]:
    """The paths of a block, each as the shapes of the blocks in it: what a rewritten block has to keep."""
    return tuple(tuple(shape(part) for part in path if isinstance(part, Block)) for path in block.paths)


def without_texts(block: Block) -> Block:
    """The block with nothing in its outlines and conclusions."""
    paths = tuple(tuple(without_texts(p) if isinstance(p, Block) else p for p in path) for path in block.paths)
    return Block(("",) * len(block.outlines), paths, "")


def think(parts: Sequence[str | Block]) -> str:
    """The trajectory column of a Multiverse-1K row: canonical text in Think tags, announcements included."""
    return "\n".join([Tag.THINK.text, render(announce(parts)), Tag.END_THINK.text])


def parse_think(text: str, *, sample: str | None = None) -> Parts:
    """The inverse of `think`.

    Raises:
        StructureError: the text breaks the grammar.
    """
    inside = text.strip().removeprefix(Tag.THINK.text).removesuffix(Tag.END_THINK.text)
    return without_announcements(parse_text(inside.removeprefix("\n").removesuffix("\n"), sample=sample))


def merge(parts: Sequence[str | Block]) -> Parts:
    """Join neighbouring texts, as they would be read back."""
    merged: list[str | Block] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += "\n" + part
        else:
            merged.append(part)
    return tuple(merged)
