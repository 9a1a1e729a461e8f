"""The grammar of parallel blocks as an incremental state machine over token ids.

One machine reads one stream: a whole response (preprocessing, `parser.parse`) or one branch of a running
generation (`inference`). It never fails: a broken rule is counted in `malformed`, the tokens stay in the stream as
plain text, and `problem` keeps the first one, from which the strict parser makes an error.

What it accepts (arXiv 2506.09991, section 3; Multiverse-1K spells it with one newline in each gap)::

    text      := (token | block)*
    block     := <Parallel> \\n goal (\\n path)+ \\n <Conclusion> token* </Conclusion> \\n </Parallel>
    goal      := <Goal> (\\n outline)+ \\n </Goal>
    outline   := <Outline> \\n label token* </Outline>
    path      := <Path> \\n label text </Path>

Tolerance: a header (up to `</Goal>`) that meets a tag it cannot take is given up, and the tag is read again as part
of the enclosing text; a conclusion that meets one is closed; any other misplaced tag is plain text.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, auto

from megatron_multiverse.structure.tags import StructureVocab, Tag
from megatron_multiverse.structure.tree import BlockSpan, PathSpan


class Event(Enum):
    """What a pushed token did."""

    TEXT = auto()
    """Plain text."""
    TAG = auto()
    """A tag in its place."""
    FORK = auto()
    """`</Goal>` closed a valid goal: the paths of `machine.outlines` can run."""
    PATH_END = auto()
    """`</Path>` closed a path."""
    BLOCK_END = auto()
    """`</Parallel>` closed a block."""
    MALFORMED = auto()
    """A tag out of place, or a goal that cannot be forked; it stays in the stream as plain text."""


@dataclass(frozen=True)
class Outline:
    """One announced path: its label as text and as the ids to be forced at the start of the path."""

    label: str
    label_ids: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """The first broken rule: its code, where, what was found, what the grammar expected."""

    code: str
    token_index: int
    found: str
    expected: str


class _Phase(Enum):
    HEAD = "<Goal> after a newline"
    GOAL = "<Outline> or </Goal>, each after one newline"
    OUTLINE = "</Outline>"
    PATHS = "<Path> or <Conclusion>, each after one newline"
    PATH = "text, <Parallel> or </Path>"
    CONCLUSION = "</Conclusion>"
    AFTER = "</Parallel> after one newline"


_GAP_PHASES = frozenset({_Phase.HEAD, _Phase.GOAL, _Phase.PATHS, _Phase.AFTER})


@dataclass
class _Frame:
    """An open block."""

    span: BlockSpan
    prefix: str
    """What labels of this block start with: ``""`` or ``"2."``."""
    phase: _Phase = _Phase.HEAD
    outlines: list[Outline] = field(default_factory=list)
    gap: int = 0
    """Newlines since the last tag; -1 once anything else was seen in the gap."""


class StructureMachine:
    """Reads the response of one stream, token by token.

    Args:
        vocab: ids of tags, newline and label pieces.
        max_depth: blocks deeper than this are plain text (`None`: no limit).
        max_paths: a goal with more outlines than this is plain text (`None`: no limit).
    """

    def __init__(self, vocab: StructureVocab, *, max_depth: int | None = None, max_paths: int | None = None) -> None:
        self.vocab = vocab
        self.max_depth = max_depth
        self.max_paths = max_paths
        self.malformed: Counter[str] = Counter()
        self.problem: Problem | None = None
        self.num_tokens = 0
        self.blocks: list[BlockSpan] = []
        self.ended = False
        """A child machine saw its `</Path>`."""
        self._stack: list[_Frame] = []
        self._think = 0  # 0 never opened, 1 open, 2 closed
        self._base_depth = 0
        self._in_path = False
        self._base_label = ""
        self._label_ids: list[int] | None = None  # being read; None when no label is due
        self._label_text = ""
        self._label_newline = False
        self._last: int | None = None

    # -- what callers ask --------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Number of paths around the current token."""
        return self._base_depth + sum(frame.phase is _Phase.PATH for frame in self._stack)

    @property
    def outlines(self) -> list[Outline]:
        """Outlines of the innermost open block."""
        return self._stack[-1].outlines

    @property
    def watching(self) -> bool:
        """Whether the next plain token matters (inside a gap or a label); else it can be skipped."""
        return self._label_ids is not None or (bool(self._stack) and self._stack[-1].phase in _GAP_PHASES)

    def skip(self, count: int, last_id: int) -> None:
        """Take `count` plain tokens at once, the last of them `last_id`. Only while not `watching`."""
        self.num_tokens += count
        self._last = last_id

    def push(self, token_id: int) -> Event:
        """Read one token and say what it did."""
        tag = self.vocab.tag_of.get(token_id)
        event = self._plain(token_id) if tag is None else self._tag(tag)
        self.num_tokens += 1
        self._last = token_id
        return event

    # -- fork and join (inference) -----------------------------------------------------------------------------

    def fork(self, k: int) -> StructureMachine:
        """A machine for path `k` of the block that just forked; push the path's tokens, gap newline first."""
        child = StructureMachine(self.vocab, max_depth=self.max_depth, max_paths=self.max_paths)
        child._base_depth = self.depth + 1
        child._in_path = True
        child._base_label = self._stack[-1].outlines[k].label
        return child

    def join(self) -> None:
        """All paths of the block ran in child machines and ended; push the conclusion next."""
        frame = self._stack[-1]
        for outline in frame.outlines:
            frame.span.paths.append(PathSpan(self.num_tokens, self.num_tokens, self.num_tokens, outline.label))

    def closing_ids(self) -> list[int]:
        """Ids that close, innermost first, everything this stream has open (each tag on a line of its own)."""
        tags: list[Tag] = []
        for frame in reversed(self._stack):
            tags += _CLOSERS[frame.phase]
        if self._in_path and not self.ended:
            tags.append(Tag.END_PATH)
        if self._think == 1:
            tags.append(Tag.END_THINK)
        ids: list[int] = []
        for tag in tags:
            if (ids[-1] if ids else self._last) != self.vocab.newline_id:
                ids.append(self.vocab.newline_id)
            ids.append(self.vocab.tag_ids[tag])
        return ids

    def finish(self) -> None:
        """The stream is over: count what is still open and give up headers that never forked."""
        for frame in reversed(list(self._stack)):
            self._note("unclosed", "the end of the text", frame.phase.value)
            if not frame.span.paths:
                self._drop()
                continue
            if frame.phase is _Phase.PATH:
                frame.span.paths[-1].end = self.num_tokens
            self._close(self.num_tokens)
        if self._think == 1:
            self._note("unclosed", "the end of the text", "</Think>")

    # -- plain tokens ------------------------------------------------------------------------------------------

    def _plain(self, token_id: int) -> Event:
        if self._label_ids is not None:
            self._read_label(token_id)
        elif self._stack and (frame := self._stack[-1]).phase in _GAP_PHASES:
            if token_id == self.vocab.newline_id and frame.gap == 0:
                frame.gap = 1
            elif frame.gap != -1:
                self._note(
                    "gap",
                    "text" if token_id != self.vocab.newline_id else "a second newline",
                    _gap_words(frame),
                )
                frame.gap = -1
            if frame.gap == -1 and frame.phase is _Phase.AFTER:
                self._close(self.num_tokens)
        return Event.TEXT

    def _start_label(self) -> None:
        self._label_ids, self._label_text, self._label_newline = [], "", False

    def _read_label(self, token_id: int) -> None:
        assert self._label_ids is not None
        if not self._label_newline:
            if token_id == self.vocab.newline_id:
                self._label_newline = True
            else:
                self._end_label("text instead of a newline")
            return
        piece = self.vocab.label_pieces.get(token_id)
        if piece is None:
            self._end_label("text instead of a label")
            return
        self._label_ids.append(token_id)
        self._label_text += piece
        if piece.endswith(":"):
            self._end_label(None)

    def _end_label(self, fault: str | None) -> None:
        """The label is complete (`fault` None) or missing; check it against the order of the block."""
        frame = self._stack[-1] if self._stack else None
        label, ids = self._label_text, tuple(self._label_ids or ())
        self._label_ids = None
        if fault is not None:
            self._note("label", fault, f"a newline and a label such as {self._expected_label(frame)}")
            return
        if label != self._expected_label(frame):
            self._note("label_order", f"label {label}", f"label {self._expected_label(frame)}")
        if frame is not None and frame.phase is _Phase.OUTLINE:
            frame.outlines[-1] = Outline(label, ids)
        elif frame is not None:
            frame.span.paths[-1].label = label
            frame.span.paths[-1].forced_end = self.num_tokens + 1

    def _expected_label(self, frame: _Frame | None) -> str:
        if frame is None:
            return self._base_label
        if frame.phase is _Phase.OUTLINE:
            return f"{frame.prefix}{len(frame.outlines)}:"
        k = len(frame.span.paths)
        return frame.outlines[k - 1].label if k <= len(frame.outlines) else f"{frame.prefix}{k}:"

    # -- tags --------------------------------------------------------------------------------------------------

    def _tag(self, tag: Tag) -> Event:
        if self._label_ids is not None:
            self._end_label(f"{tag.text} instead of a label")
        if not self._stack:
            return self._tag_in_text(tag)
        phase = self._stack[-1].phase
        if phase is _Phase.PATH:
            return self._tag_in_text(tag)
        return _HANDLERS[phase](self, self._stack[-1], tag)

    def _tag_in_text(self, tag: Tag) -> Event:
        frame = self._stack[-1] if self._stack else None
        if tag is Tag.PARALLEL:
            return self._open_block(frame)
        if frame is None and self._in_path and not self.ended:
            if tag is Tag.PATH and self.num_tokens <= 1:
                self._start_label()
                return Event.TAG
            if tag is Tag.END_PATH:
                self.ended = True
                return Event.PATH_END
        if frame is not None and tag is Tag.END_PATH:
            frame.span.paths[-1].end = self.num_tokens + 1
            frame.phase, frame.gap = _Phase.PATHS, 0
            return Event.PATH_END
        if tag in (Tag.THINK, Tag.END_THINK) and frame is None and not self._in_path:
            due = Tag.THINK if self._think == 0 else Tag.END_THINK
            if tag is due and self._think < 2:
                self._think += 1
                return Event.TAG
        return self._stray(tag, _Phase.PATH.value if frame is not None or self._in_path else "text or <Parallel>")

    def _open_block(self, frame: _Frame | None) -> Event:
        if self.max_depth is not None and self.depth >= self.max_depth:
            return self._stray(Tag.PARALLEL, f"at most {self.max_depth} nested blocks", code="too_deep")
        label = frame.span.paths[-1].label if frame is not None else self._base_label
        prefix = label[:-1] + "." if label else ""
        self._stack.append(_Frame(BlockSpan(start=self.num_tokens), prefix))
        return Event.TAG

    def _tag_in_head(self, frame: _Frame, tag: Tag) -> Event:
        if tag is Tag.GOAL:
            self._check_gap(frame, tag)
            frame.phase, frame.gap = _Phase.GOAL, 0
            return Event.TAG
        return self._give_up(frame, tag)

    def _tag_in_goal(self, frame: _Frame, tag: Tag) -> Event:
        if tag is Tag.OUTLINE:
            self._check_gap(frame, tag)
            frame.phase = _Phase.OUTLINE
            frame.outlines.append(Outline("", ()))
            self._start_label()
            return Event.TAG
        if tag is Tag.END_GOAL:
            self._check_gap(frame, tag)
            return self._fork_point(frame)
        return self._give_up(frame, tag)

    def _fork_point(self, frame: _Frame) -> Event:
        count = len(frame.outlines)
        if count == 0:
            code, expected = "no_outline", "at least one <Outline> before </Goal>"
        elif any(not outline.label_ids for outline in frame.outlines):
            code, expected = "unlabelled_outline", "a label in every outline"
        elif self.max_paths is not None and count > self.max_paths:
            code, expected = "too_many_paths", f"at most {self.max_paths} outlines"
        else:
            frame.phase, frame.gap = _Phase.PATHS, 0
            frame.span.goal_end = self.num_tokens + 1
            return Event.FORK
        self._note(code, f"</Goal> after {count} outlines", expected)
        self._drop()
        return Event.MALFORMED

    def _tag_in_outline(self, frame: _Frame, tag: Tag) -> Event:
        if tag is Tag.END_OUTLINE:
            frame.phase, frame.gap = _Phase.GOAL, 0
            return Event.TAG
        return self._give_up(frame, tag)

    def _tag_between_paths(self, frame: _Frame, tag: Tag) -> Event:
        span = frame.span
        if tag is Tag.PATH:
            self._check_gap(frame, tag)
            if len(span.paths) == len(frame.outlines):
                self._note(
                    "path_count",
                    f"path {len(span.paths) + 1}",
                    f"{len(frame.outlines)} paths, one per outline",
                )
            start = span.region_end if span.paths else span.goal_end
            span.paths.append(PathSpan(start, -1, self.num_tokens + 1))
            frame.phase = _Phase.PATH
            self._start_label()
            return Event.TAG
        if not span.paths:
            return self._give_up(frame, tag)
        if tag is Tag.CONCLUSION:
            self._check_gap(frame, tag)
            if len(span.paths) < len(frame.outlines):
                self._note("path_count", f"<Conclusion> after path {len(span.paths)}", f"{len(frame.outlines)} paths")
            frame.phase = _Phase.CONCLUSION
            span.forced_end = self.num_tokens + 1
            return Event.TAG
        if tag is Tag.END_PARALLEL:
            self._note("no_conclusion", tag.text, frame.phase.value)
            self._close(self.num_tokens + 1)
            return Event.BLOCK_END
        return self._stray(tag, frame.phase.value)

    def _tag_in_conclusion(self, frame: _Frame, tag: Tag) -> Event:
        if tag is Tag.END_CONCLUSION:
            frame.phase, frame.gap = _Phase.AFTER, 0
            return Event.TAG
        return self._close_early(frame, tag)

    def _tag_after_conclusion(self, frame: _Frame, tag: Tag) -> Event:
        if tag is Tag.END_PARALLEL:
            self._check_gap(frame, tag)
            self._close(self.num_tokens + 1)
            return Event.BLOCK_END
        return self._close_early(frame, tag)

    # -- what handlers share -----------------------------------------------------------------------------------

    def _check_gap(self, frame: _Frame, tag: Tag) -> None:
        if frame.gap == 0:
            self._note("gap", f"{tag.text} right behind a tag", f"one newline before {tag.text}")

    def _give_up(self, frame: _Frame, tag: Tag) -> Event:
        """The open header cannot take `tag`: the header becomes plain text and `tag` is read again."""
        self._note("broken_header", tag.text, frame.phase.value)
        self._drop()
        return self._tag(tag)

    def _close_early(self, frame: _Frame, tag: Tag) -> Event:
        """The open conclusion cannot take `tag`: the block ends before it and `tag` is read again."""
        self._note("unclosed_conclusion", tag.text, frame.phase.value)
        if tag is Tag.END_PARALLEL:
            self._close(self.num_tokens + 1)
            return Event.BLOCK_END
        self._close(self.num_tokens)
        return self._tag(tag)

    def _stray(self, tag: Tag, expected: str, *, code: str = "stray_tag") -> Event:
        self._note(code, tag.text, expected)
        return Event.MALFORMED

    def _note(self, code: str, found: str, expected: str) -> None:
        self.malformed[code] += 1
        if self.problem is None:
            self.problem = Problem(code, self.num_tokens, found, expected)

    def _drop(self) -> None:
        self._stack.pop()
        self._label_ids = None

    def _close(self, end: int) -> None:
        """Take the innermost block from the stack into the path, or the text, that holds it."""
        span = self._stack.pop().span
        span.end = end
        (self._stack[-1].span.paths[-1].blocks if self._stack else self.blocks).append(span)


def _gap_words(frame: _Frame) -> str:
    return f"{frame.phase.value}, with exactly one newline in the gap"


_BLOCK_TAIL = [Tag.CONCLUSION, Tag.END_CONCLUSION, Tag.END_PARALLEL]
_CLOSERS: dict[_Phase, list[Tag]] = {
    _Phase.HEAD: [Tag.END_PARALLEL],
    _Phase.GOAL: [Tag.END_GOAL, Tag.END_PARALLEL],
    _Phase.OUTLINE: [Tag.END_OUTLINE, Tag.END_GOAL, Tag.END_PARALLEL],
    _Phase.PATHS: _BLOCK_TAIL,
    _Phase.PATH: [Tag.END_PATH, *_BLOCK_TAIL],
    _Phase.CONCLUSION: [Tag.END_CONCLUSION, Tag.END_PARALLEL],
    _Phase.AFTER: [Tag.END_PARALLEL],
}
_HANDLERS = {
    _Phase.HEAD: StructureMachine._tag_in_head,
    _Phase.GOAL: StructureMachine._tag_in_goal,
    _Phase.OUTLINE: StructureMachine._tag_in_outline,
    _Phase.PATHS: StructureMachine._tag_between_paths,
    _Phase.CONCLUSION: StructureMachine._tag_in_conclusion,
    _Phase.AFTER: StructureMachine._tag_after_conclusion,
}
