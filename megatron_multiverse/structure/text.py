"""The text side of the structure: trajectories as trees of strings, to canonical text and back.

Canonical text is that of Multiverse-1K: each tag alone on its line, one newline in each structural gap, labels
``1:``, ``2:``, nested ``2.1:``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_multiverse.errors import StructureError
from megatron_multiverse.structure.document import BlockSpan
from megatron_multiverse.structure.parser import parse
from megatron_multiverse.structure.tags import TAGS, StructureVocab

Parts = tuple["str | Block", ...]
"""Text and blocks in turn, each beginning on a line of its own; strings carry no newline at their ends for that."""


@dataclass(frozen=True)
class Block:
    """A parallel block; labels are not written, they follow from the place in the tree."""

    outlines: tuple[str, ...]
    paths: tuple[Parts, ...]
    conclusion: str


def render(parts: Sequence[str | Block], *, prefix: str = "") -> str:
    """Canonical text of a trajectory.

    Args:
        parts: text and blocks; neighbours are put on separate lines.
        prefix: what the labels of its blocks start with (``"2."`` inside path 2).
    """
    return "\n".join(part if isinstance(part, str) else _render_block(part, prefix) for part in parts)


def _render_block(block: Block, prefix: str) -> str:
    lines = ["<Parallel>", "<Goal>"]
    for k, outline in enumerate(block.outlines, start=1):
        lines += ["<Outline>", f"{prefix}{k}: {outline}", "</Outline>"]
    lines.append("</Goal>")
    for k, path in enumerate(block.paths, start=1):
        lines += ["<Path>", f"{prefix}{k}: " + render(path, prefix=f"{prefix}{k}."), "</Path>"]
    lines += ["<Conclusion>", block.conclusion, "</Conclusion>", "</Parallel>"]
    return "\n".join(lines)


_LEXER = re.compile("|".join([*map(re.escape, TAGS), r"\n", r"(?<=\n)[0-9][0-9.]*:", r"[^\n<]+", "<"]))
_NEWLINE, _WORD, _FIRST_LABEL = len(TAGS), len(TAGS) + 1, len(TAGS) + 2


def _lex(text: str) -> tuple[list[int], list[int], StructureVocab]:
    """Pseudo tokens (tags, newlines, labels, other runs of text), their offsets, and the vocabulary of both."""
    fixed = {tag: k for k, tag in enumerate(TAGS)} | {"\n": _NEWLINE}
    labels: dict[str, int] = {}
    ids, offsets = [], []
    for match in _LEXER.finditer(text):
        piece = match.group()
        token = fixed.get(piece, _WORD)
        if token == _WORD and piece[0].isdigit() and piece.endswith(":"):
            token = labels.setdefault(piece, _FIRST_LABEL + len(labels))
        ids.append(token)
        offsets.append(match.start())
    pieces = {token: piece for piece, token in labels.items()}
    return ids, offsets, StructureVocab(tuple(range(len(TAGS))), _NEWLINE, pieces)


def parse_text(text: str, *, sample: str | None = None) -> Parts:
    """The tree of a canonical trajectory; the inverse of `render`.

    Args:
        text: a response, e.g. the content of a Multiverse-1K row.
        sample: name of the sample for the error.

    Raises:
        StructureError: the text breaks the grammar; says the character position.
    """
    ids, offsets, vocab = _lex(text)
    offsets.append(len(text))
    try:
        document = parse(ids, vocab, sample=sample)
    except StructureError as error:
        error.char_index = offsets[error.token_index]
        error.args = (str(error),)
        raise
    return _Reader(text, offsets).parts(0, len(ids), document.blocks)


class _Reader:
    """Cuts the strings of a tree out of the text."""

    def __init__(self, text: str, offsets: list[int]) -> None:
        self.text = text
        self.offsets = offsets

    def parts(self, start: int, end: int, blocks: list[BlockSpan]) -> Parts:
        parts: list[str | Block] = []
        begin = self.offsets[start]
        for block in blocks:
            block_begin = self.offsets[block.start]
            if block_begin > begin:
                parts.append(self.text[begin : block_begin - 1])
            parts.append(self._block(block))
            begin = self.offsets[block.end] + 1
        if begin <= self.offsets[end]:
            parts.append(self.text[begin : self.offsets[end]])
        return tuple(parts)

    def _block(self, block: BlockSpan) -> Block:
        goal = self.text[self.offsets[block.start] : self.offsets[block.goal_end]]
        outlines = tuple(re.findall(r"<Outline>\n[0-9.]+: ?(.*?)\n</Outline>", goal, flags=re.DOTALL))
        paths = []
        for path in block.paths:
            begin = path.forced_end  # behind the label; the label's blank belongs to it
            parts = self.parts(begin, path.end - 2, path.blocks)
            head = parts[0]
            paths.append((head[1:], *parts[1:]) if isinstance(head, str) and head[:1] == " " else parts)
        tail = self.text[self.offsets[block.forced_end] : self.offsets[block.end]]
        conclusion = tail[1 : tail.index("\n</Conclusion>")]
        return Block(outlines, tuple(paths), conclusion)
