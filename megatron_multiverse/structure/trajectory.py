"""Trajectories as trees of strings: `render` writes them as canonical text, `parse_text` reads that back.

Canonical text is spelled like Multiverse-1K: each tag is alone on its line, one newline fills each gap between tags,
and labels are ``1:``, ``2:``, in nested blocks ``2.1:``.
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
"""Text and blocks in turn. Each part starts on its own line; the newline between two parts is not in the strings."""


@dataclass(frozen=True)
class Block:
    """A parallel block. Labels are not stored, since they follow from the place in the tree."""

    outlines: tuple[str, ...]
    """One per path."""
    paths: tuple[Parts, ...]
    conclusion: str


def render(parts: Sequence[str | Block], *, prefix: str = "") -> str:
    """Canonical text of a trajectory.

    Args:
        parts: text and blocks; each is put on lines of its own.
        prefix: what the labels of its blocks start with, ``"2."`` inside path 2.
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
    """Cut text into tokens that the grammar can read: tags, newlines, labels and other runs of text.

    Returns their ids, the character at which each begins, and the vocabulary of these ids.
    """
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
    """Read canonical text into a tree: the inverse of `render`.

    Args:
        text: a response, e.g. the content of a Multiverse-1K row.
        sample: name of the sample for the error.

    Raises:
        StructureError: the text breaks the grammar; the message names the character where it does.
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
    """Cuts the strings of a tree out of the text. `offsets[i]` is the character at which token i begins."""

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
            begin = path.forced_end  # the text begins after the label and its blank, which is cut off below
            parts = self.parts(begin, path.end - 2, path.blocks)
            head = parts[0]
            paths.append((head[1:], *parts[1:]) if isinstance(head, str) and head[:1] == " " else parts)
        tail = self.text[self.offsets[block.forced_end] : self.offsets[block.end]]
        conclusion = tail[1 : tail.index("\n</Conclusion>")]
        return Block(outlines, tuple(paths), conclusion)
