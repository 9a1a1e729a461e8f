"""Trajectories as trees of strings: `render` writes them as canonical text, `parse_text` reads that back. `check_text`
judges a text without a tokenizer, and `cut_at_labels` cuts it so that every tokenizer comes to the same judgement.

Canonical text is spelled like Multiverse-1K: each tag is alone on its line, one newline fills each gap between tags,
and labels are ``1:``, ``2:``, in nested blocks ``2.1:``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_multiverse.errors import StructureError
from megatron_multiverse.structure.document import BlockSpan, Document
from megatron_multiverse.structure.parser import parse
from megatron_multiverse.structure.tags import MAX_DEPTH, TAGS, StructureVocab

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


_PIECE = re.compile("|".join([*map(re.escape, TAGS), r"\n", r"(?<=\n)[0-9][0-9.]*:", r"[^\n<]+", "<"]))
_LABEL = re.compile("[0-9][0-9.]*:")
_NEWLINE, TEXT_ID, _FIRST_LABEL = len(TAGS), len(TAGS) + 1, len(TAGS) + 2
_FIXED_IDS = {tag: k for k, tag in enumerate(TAGS)} | {"\n": _NEWLINE}
_BEFORE_LABEL = re.compile(r"<(?:Outline|(?P<path>Path))>\n(?P<label>[0-9][0-9.]*:)?")


def lex(text: str) -> tuple[list[int], list[int], StructureVocab]:
    """Cut text into tokens that the grammar can read: tags, newlines, labels and other runs of text.

    Returns:
        Their ids (`TEXT_ID` for other runs), the character at which each begins, and the vocabulary of these ids.
    """
    pieces = _PIECE.findall(text)
    ids = [_FIXED_IDS.get(piece, TEXT_ID) for piece in pieces]
    labels: dict[str, int] = {}
    for k, piece in enumerate(pieces):
        if piece[-1] == ":" and _LABEL.fullmatch(piece):
            ids[k] = labels.setdefault(piece, _FIRST_LABEL + len(labels))
    # Nothing lies between two pieces, so each begins where the one before ends.
    offsets = list(accumulate(map(len, pieces), initial=0))[:-1]
    label_pieces = {token: piece for piece, token in labels.items()}
    return ids, offsets, StructureVocab(tuple(range(len(TAGS))), _NEWLINE, label_pieces)


def _parse_lexed(text: str, sample: str | None) -> tuple[Document, list[int]]:
    """The spans of a text, and the character at which each of its tokens begins, with the end of the text behind."""
    ids, offsets, vocab = lex(text)
    offsets.append(len(text))
    try:
        return parse(ids, vocab, sample=sample, max_depth=MAX_DEPTH), offsets
    except StructureError as error:
        error.char_index = offsets[error.token_index]
        if text[error.char_index : error.char_index + 1] == "\r":
            error.found = "a carriage return (lines must end in a newline alone)"
        error.args = (str(error),)
        raise


def check_text(text: str, *, sample: str | None = None) -> None:
    """Judge a response by its text alone: the same judgement as of its tokens, cut as `cut_at_labels` says.

    Args:
        text: a response.
        sample: name of the sample for the error.

    Raises:
        StructureError: the text breaks the grammar or nests blocks deeper than `MAX_DEPTH`; the message names the
            character where it does.
    """
    _parse_lexed(text, sample)


def cut_at_labels(text: str) -> list[str]:
    """A response in pieces: tokenized one by one, they leave each label where the grammar looks for it.

    Many tokenizers have tokens that span a colon and what follows it, such as ``:**``, or a colon and a newline. The
    engine writes the label of a path in tokens of its own, so in data too it must end where a token ends. The pieces
    are cut after the label of each path, and before the labels of paths and outlines.
    """
    cuts = [0]
    for match in _BEFORE_LABEL.finditer(text):
        cuts.append(match.start("label") if match["label"] else match.end())
        if match["path"] and match["label"]:
            cuts.append(match.end())
    return [text[start:end] for start, end in pairwise([*cuts, len(text)]) if start < end]


def parse_text(text: str, *, sample: str | None = None) -> Parts:
    """Read canonical text into a tree: the inverse of `render`.

    Args:
        text: a response, e.g. the content of a Multiverse-1K row.
        sample: name of the sample for the error.

    Raises:
        StructureError: as `check_text`.
    """
    document, offsets = _parse_lexed(text, sample)
    return _Reader(text, offsets).parts(0, len(text), document.blocks)


class _Reader:
    """Cuts the strings of a tree out of the text. `offsets[i]` is the character at which token i begins.

    Canonical text has a newline around each part. Where the grammar asks for none and there is none, nothing is cut.
    """

    def __init__(self, text: str, offsets: list[int]) -> None:
        self.text = text
        self.offsets = offsets

    def parts(self, begin: int, end: int, blocks: list[BlockSpan]) -> Parts:
        """Text and blocks between two characters."""
        parts: list[str | Block] = []
        block_end = -1
        for block in blocks:
            block_begin = self.offsets[block.start]
            if block_begin > begin:
                parts.append(self.text[begin:block_begin].removesuffix("\n"))
            parts.append(self._block(block))
            block_end = self.offsets[block.end]
            begin = block_end + self.text.startswith("\n", block_end)
        if block_end < end:
            parts.append(self.text[begin:end])
        return tuple(parts)

    def _block(self, block: BlockSpan) -> Block:
        goal = self.text[self.offsets[block.start] : self.offsets[block.goal_end]]
        outlines = re.findall(r"<Outline>\n[0-9.]+: ?(.*?)</Outline>", goal, flags=re.DOTALL)
        paths = []
        for path in block.paths:
            begin = self.offsets[path.forced_end]  # after the label; the blank that follows it is cut off below
            end = self.offsets[path.end - 1]  # of </Path>
            end -= self.text.startswith("\n", end - 1)
            parts = self.parts(begin, end, path.blocks)
            head = parts[0]
            paths.append((head[1:], *parts[1:]) if isinstance(head, str) and head[:1] == " " else parts)
        tail = self.text[self.offsets[block.forced_end] : self.offsets[block.end]]
        conclusion = tail[: tail.index("</Conclusion>")].removeprefix("\n").removesuffix("\n")
        return Block(tuple(outline.removesuffix("\n") for outline in outlines), tuple(paths), conclusion)
