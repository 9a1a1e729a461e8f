"""A sample made ready for drawing: its pieces of text, its structure, and which branch wrote each token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_multiverse.inference import TimelineSpan
from megatron_multiverse.structure import TAGS, BlockSpan, Document, Layout, StructureVocab, lay_out, parse

_WORDS = re.compile("|".join([*map(re.escape, TAGS), r"\n", r"(?<=\n)[0-9][0-9.]*:", r" *[^\s<]+", r"[\s<]"]))


@dataclass(frozen=True)
class Stretch:
    """Tokens [start, end) of one branch, without those of the paths it forked."""

    branch: str
    """"" for the root, "2.1" for the first path of a block in the second path."""
    block: int
    """Number of the block that the branch belongs to, in text order; 0 for the root."""
    start: int
    end: int

    @property
    def depth(self) -> int:
        """Number of paths around the tokens."""
        return branch_depth(self.branch)


@dataclass(frozen=True)
class SampleView:
    """What the figures draw."""

    pieces: Sequence[str]
    """The text of each token."""
    document: Document
    layout: Layout
    stretches: Sequence[Stretch]
    """In text order; together they cover all tokens."""


def branch_depth(branch: str) -> int:
    """Number of paths around a branch: 0 for the root, 2 for "2.1"."""
    return branch.count(".") + 1 if branch else 0


def view_ids(
    ids: Sequence[int],
    vocab: StructureVocab,
    id_to_text: Sequence[str],
    *,
    prompt_length: int = 0,
    strict: bool = False,
    sample: str | None = None,
) -> SampleView:
    """View of tokenized prompt and response; see `structure.parse` for the arguments.

    Raises:
        StructureError: `strict` and the response breaks the grammar.
    """
    document = parse(ids, vocab, prompt_length=prompt_length, strict=strict, sample=sample)
    return SampleView([id_to_text[token] for token in ids], document, lay_out(document), stretches(document))


def view_text(text: str, *, prompt: str = "", strict: bool = False, sample: str | None = None) -> SampleView:
    """View of a text without a tokenizer: each word, tag, label and newline counts as one token.

    Raises:
        StructureError: `strict` and the text breaks the grammar.
    """
    prompt_pieces = _WORDS.findall(prompt)
    pieces = [*prompt_pieces, *_WORDS.findall(text)]
    id_to_text = list(dict.fromkeys([*TAGS, "\n", *pieces]))
    numbers = {piece: number for number, piece in enumerate(id_to_text)}
    return view_ids(
        [numbers[piece] for piece in pieces],
        StructureVocab.from_pieces(id_to_text),
        id_to_text,
        prompt_length=len(prompt_pieces),
        strict=strict,
        sample=sample,
    )


def stretches(document: Document) -> list[Stretch]:
    """The tokens of a document cut into stretches of one branch each, in text order."""
    numbers = {id(block): number for number, (_, block) in enumerate(document.walk(), start=1)}
    found: list[Stretch] = []

    def walk(branch: str, number: int, start: int, end: int, blocks: Sequence[BlockSpan]) -> None:
        for block in blocks:
            if not block.paths:
                continue
            found.append(Stretch(branch, number, start, block.goal_end))
            for k, path in enumerate(block.paths, start=1):
                name = f"{branch}.{k}" if branch else str(k)
                walk(name, numbers[id(block)], path.start, path.end, path.blocks)
            start = block.region_end
        if start < end:
            found.append(Stretch(branch, number, start, end))

    walk("", 0, 0, document.num_tokens, document.blocks)
    return found


def ideal_timeline(view: SampleView) -> list[TimelineSpan]:
    """When each branch runs if every branch writes one token per step: the step is the position."""
    positions = view.layout.position_ids
    first = view.document.prompt_length
    spans = []
    for stretch in view.stretches:
        start = max(stretch.start, first)
        if start < stretch.end:
            begin = int(positions[start]) - first
            tokens = stretch.end - start
            spans.append(TimelineSpan(stretch.branch, stretch.block, begin, begin + tokens, tokens))
    return spans


def sequential_timeline(view: SampleView) -> list[TimelineSpan]:
    """When each branch runs if the tokens are written one after the other in text order."""
    first = view.document.prompt_length
    return [
        TimelineSpan(s.branch, s.block, max(s.start, first) - first, s.end - first, s.end - max(s.start, first))
        for s in view.stretches
        if s.end > first
    ]
