"""What the state machine keeps of an open block, and the words it uses for what it reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from megatron_multiverse.structure.document import BlockSpan
from megatron_multiverse.structure.tags import StructureVocab, Tag


class Event(Enum):
    """What a pushed token did."""

    TEXT = auto()
    """Plain text."""
    TAG = auto()
    """A tag in its place."""
    FORK = auto()
    """`</Goal>` closed a valid goal: the paths announced in `machine.outlines` can run."""
    PATH_END = auto()
    """`</Path>` closed a path."""
    BLOCK_END = auto()
    """`</Parallel>` closed a block."""
    MALFORMED = auto()
    """A tag out of place, or a goal that cannot be forked; it stays in the stream as plain text."""


@dataclass(frozen=True)
class Outline:
    """One announced path: its label as text, and as the ids that the engine writes at the start of the path."""

    label: str
    label_ids: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """A broken rule: its code, where it was broken, what was found there and what the grammar expected."""

    code: str
    token_index: int
    found: str
    expected: str


class Phase(Enum):
    """Where in an open block the stream stands; the value says what may come next, for messages."""

    HEAD = "<Goal> after a newline"
    GOAL = "<Outline> or </Goal>, each after one newline"
    OUTLINE = "</Outline>"
    PATHS = "<Path> or <Conclusion>, each after one newline"
    PATH = "text, <Parallel> or </Path>"
    CONCLUSION = "</Conclusion>"
    AFTER = "</Parallel> after one newline"

    # Members are looked up in sets and dicts for every token of a gap; Enum's own hash is a Python function.
    __hash__ = object.__hash__


GAP_PHASES = frozenset({Phase.HEAD, Phase.GOAL, Phase.PATHS, Phase.AFTER})
"""The phases between two tags, where exactly one newline may stand and no text."""


@dataclass
class Frame:
    """An open block."""

    span: BlockSpan
    prefix: str
    """What the labels of this block start with: ``""`` outside of paths, ``"2."`` in path 2."""
    phase: Phase = Phase.HEAD
    outlines: list[Outline] = field(default_factory=list)
    gap: int = 0
    """Newlines since the last tag; -1 after anything else in this gap, which has been counted as broken then."""

    @property
    def gap_rule(self) -> str:
        """What the grammar expects in the current gap."""
        return f"{self.phase.value}, with exactly one newline in the gap"

    @property
    def expected_label(self) -> str:
        """The label that the outline or path just opened should have."""
        if self.phase is Phase.OUTLINE:
            return f"{self.prefix}{len(self.outlines)}:"
        # A path repeats the label of its outline. One path too many has no outline, so it is numbered on.
        k = len(self.span.paths)
        return self.outlines[k - 1].label if k <= len(self.outlines) else f"{self.prefix}{k}:"


class LabelReader:
    """Reads the newline and the label, e.g. ``2.1:``, that follow `<Outline>` or `<Path>`.

    Args:
        vocab: ids of the newline and of the pieces of labels.
        may_be_glued: whether the last token of the label may also hold text that follows it, such as ``:**``. A model
            writes the labels of its outlines in whatever tokens it likes. The engine writes those of paths, in tokens
            of their own, and data must show a path as the engine begins it.
    """

    def __init__(self, vocab: StructureVocab, *, may_be_glued: bool) -> None:
        self.vocab = vocab
        self.may_be_glued = may_be_glued
        self.text = ""
        self.ids: list[int] = []
        self.fault: str | None = None
        """What stands there instead of a label, if there is none."""
        self._newline_read = False

    def push(self, token_id: int) -> bool:
        """Read one plain token; True when the label is complete or `fault` says why there is none."""
        if not self._newline_read:
            self._newline_read = token_id == self.vocab.newline_id
            self.fault = None if self._newline_read else "text instead of a newline"
            return not self._newline_read
        pieces = self.vocab.label_pieces
        ids: tuple[int, ...] = (token_id,) if token_id in pieces else ()
        if self.may_be_glued and not ids:
            ids = self.vocab.glued_labels.get(token_id, ())
        text = self.text + "".join(pieces[token] for token in ids)
        if not ids or not text[0].isdigit():
            self.fault = "text instead of a label"
            return True
        self.ids += ids
        self.text = text
        return text.endswith(":")


_BLOCK_TAIL = [Tag.CONCLUSION, Tag.END_CONCLUSION, Tag.END_PARALLEL]
CLOSERS: dict[Phase, list[Tag]] = {
    Phase.HEAD: [Tag.END_PARALLEL],
    Phase.GOAL: [Tag.END_GOAL, Tag.END_PARALLEL],
    Phase.OUTLINE: [Tag.END_OUTLINE, Tag.END_GOAL, Tag.END_PARALLEL],
    Phase.PATHS: _BLOCK_TAIL,
    Phase.PATH: [Tag.END_PATH, *_BLOCK_TAIL],
    Phase.CONCLUSION: [Tag.END_CONCLUSION, Tag.END_PARALLEL],
    Phase.AFTER: [Tag.END_PARALLEL],
}
"""The tags that close a block which is open in this phase."""
