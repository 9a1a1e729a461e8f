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

from megatron_multiverse.structure.document import BlockSpan, PathSpan
from megatron_multiverse.structure.frames import (
    CLOSERS,
    GAP_PHASES,
    Event,
    Frame,
    LabelReader,
    Outline,
    Phase,
    Problem,
)
from megatron_multiverse.structure.tags import StructureVocab, Tag


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
        self._stack: list[Frame] = []
        self._think = 0  # 0 never opened, 1 open, 2 closed
        self._base_depth = 0
        self._in_path = False
        self._base_label = ""
        self._label: LabelReader | None = None  # while a label is due
        self._last: int | None = None

    @property
    def depth(self) -> int:
        """Number of paths around the current token."""
        return self._base_depth + sum(frame.phase is Phase.PATH for frame in self._stack)

    @property
    def outlines(self) -> list[Outline]:
        """Outlines of the innermost open block."""
        return self._stack[-1].outlines

    @property
    def watching(self) -> bool:
        """Whether the next plain token matters (inside a gap or a label); else it can be skipped."""
        return self._label is not None or (bool(self._stack) and self._stack[-1].phase in GAP_PHASES)

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
            tags += CLOSERS[frame.phase]
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
            if frame.phase is Phase.PATH:
                frame.span.paths[-1].end = self.num_tokens
            self._close(self.num_tokens)
        if self._think == 1:
            self._note("unclosed", "the end of the text", "</Think>")

    def _plain(self, token_id: int) -> Event:
        if self._label is not None:
            if self._label.push(token_id):
                self._end_label(self._label)
        elif self._stack and self._stack[-1].phase in GAP_PHASES:
            self._read_gap(self._stack[-1], token_id)
        return Event.TEXT

    def _read_gap(self, frame: Frame, token_id: int) -> None:
        if token_id == self.vocab.newline_id and frame.gap == 0:
            frame.gap = 1
            return
        if frame.gap != -1:
            found = "a second newline" if token_id == self.vocab.newline_id else "text"
            self._note("gap", found, frame.gap_rule)
            frame.gap = -1
        if frame.phase is Phase.AFTER:
            self._close(self.num_tokens)

    def _end_label(self, label: LabelReader) -> None:
        """The label is complete or missing; check it against the order of the block."""
        self._label = None
        frame = self._stack[-1] if self._stack else None
        expected = self._expected_label(frame)
        if label.fault is not None:
            self._note("label", label.fault, f"a newline and a label such as {expected}")
            return
        if label.text != expected:
            self._note("label_order", f"label {label.text}", f"label {expected}")
        if frame is not None and frame.phase is Phase.OUTLINE:
            frame.outlines[-1] = Outline(label.text, tuple(label.ids))
        elif frame is not None:
            frame.span.paths[-1].label = label.text
            frame.span.paths[-1].forced_end = self.num_tokens + 1

    def _expected_label(self, frame: Frame | None) -> str:
        if frame is None:
            return self._base_label
        if frame.phase is Phase.OUTLINE:
            return f"{frame.prefix}{len(frame.outlines)}:"
        k = len(frame.span.paths)
        return frame.outlines[k - 1].label if k <= len(frame.outlines) else f"{frame.prefix}{k}:"

    def _tag(self, tag: Tag) -> Event:
        if self._label is not None:
            self._label.fault = f"{tag.text} instead of a label"
            self._end_label(self._label)
        if not self._stack:
            return self._tag_in_text(tag)
        phase = self._stack[-1].phase
        if phase is Phase.PATH:
            return self._tag_in_text(tag)
        return _HANDLERS[phase](self, self._stack[-1], tag)

    def _tag_in_text(self, tag: Tag) -> Event:
        frame = self._stack[-1] if self._stack else None
        if tag is Tag.PARALLEL:
            return self._open_block(frame)
        if frame is None and self._in_path and not self.ended:
            if tag is Tag.PATH and self.num_tokens <= 1:
                self._label = LabelReader(self.vocab)
                return Event.TAG
            if tag is Tag.END_PATH:
                self.ended = True
                return Event.PATH_END
        if frame is not None and tag is Tag.END_PATH:
            frame.span.paths[-1].end = self.num_tokens + 1
            frame.phase, frame.gap = Phase.PATHS, 0
            return Event.PATH_END
        if tag in (Tag.THINK, Tag.END_THINK) and frame is None and not self._in_path:
            due = Tag.THINK if self._think == 0 else Tag.END_THINK
            if tag is due and self._think < 2:
                self._think += 1
                return Event.TAG
        return self._stray(tag, Phase.PATH.value if frame is not None or self._in_path else "text or <Parallel>")

    def _open_block(self, frame: Frame | None) -> Event:
        if self.max_depth is not None and self.depth >= self.max_depth:
            return self._stray(Tag.PARALLEL, f"at most {self.max_depth} nested blocks", code="too_deep")
        label = frame.span.paths[-1].label if frame is not None else self._base_label
        prefix = label[:-1] + "." if label else ""
        self._stack.append(Frame(BlockSpan(start=self.num_tokens), prefix))
        return Event.TAG

    def _tag_in_head(self, frame: Frame, tag: Tag) -> Event:
        if tag is Tag.GOAL:
            self._check_gap(frame, tag)
            frame.phase, frame.gap = Phase.GOAL, 0
            return Event.TAG
        return self._give_up(frame, tag)

    def _tag_in_goal(self, frame: Frame, tag: Tag) -> Event:
        if tag is Tag.OUTLINE:
            self._check_gap(frame, tag)
            frame.phase = Phase.OUTLINE
            frame.outlines.append(Outline("", ()))
            self._label = LabelReader(self.vocab)
            return Event.TAG
        if tag is Tag.END_GOAL:
            self._check_gap(frame, tag)
            return self._fork_point(frame)
        return self._give_up(frame, tag)

    def _fork_point(self, frame: Frame) -> Event:
        count = len(frame.outlines)
        if count == 0:
            code, expected = "no_outline", "at least one <Outline> before </Goal>"
        elif any(not outline.label_ids for outline in frame.outlines):
            code, expected = "unlabelled_outline", "a label in every outline"
        elif self.max_paths is not None and count > self.max_paths:
            code, expected = "too_many_paths", f"at most {self.max_paths} outlines"
        else:
            frame.phase, frame.gap = Phase.PATHS, 0
            frame.span.goal_end = self.num_tokens + 1
            return Event.FORK
        self._note(code, f"</Goal> after {count} outlines", expected)
        self._drop()
        return Event.MALFORMED

    def _tag_in_outline(self, frame: Frame, tag: Tag) -> Event:
        if tag is Tag.END_OUTLINE:
            frame.phase, frame.gap = Phase.GOAL, 0
            return Event.TAG
        return self._give_up(frame, tag)

    def _tag_between_paths(self, frame: Frame, tag: Tag) -> Event:
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
            frame.phase = Phase.PATH
            self._label = LabelReader(self.vocab)
            return Event.TAG
        if not span.paths:
            return self._give_up(frame, tag)
        if tag is Tag.CONCLUSION:
            self._check_gap(frame, tag)
            if len(span.paths) < len(frame.outlines):
                self._note("path_count", f"<Conclusion> after path {len(span.paths)}", f"{len(frame.outlines)} paths")
            frame.phase = Phase.CONCLUSION
            span.forced_end = self.num_tokens + 1
            return Event.TAG
        if tag is Tag.END_PARALLEL:
            self._note("no_conclusion", tag.text, frame.phase.value)
            self._close(self.num_tokens + 1)
            return Event.BLOCK_END
        return self._stray(tag, frame.phase.value)

    def _tag_in_conclusion(self, frame: Frame, tag: Tag) -> Event:
        if tag is Tag.END_CONCLUSION:
            frame.phase, frame.gap = Phase.AFTER, 0
            return Event.TAG
        return self._close_early(frame, tag)

    def _tag_after_conclusion(self, frame: Frame, tag: Tag) -> Event:
        if tag is Tag.END_PARALLEL:
            self._check_gap(frame, tag)
            self._close(self.num_tokens + 1)
            return Event.BLOCK_END
        return self._close_early(frame, tag)

    def _check_gap(self, frame: Frame, tag: Tag) -> None:
        if frame.gap == 0:
            self._note("gap", f"{tag.text} right behind a tag", f"one newline before {tag.text}")

    def _give_up(self, frame: Frame, tag: Tag) -> Event:
        """The open header cannot take `tag`: the header becomes plain text and `tag` is read again."""
        self._note("broken_header", tag.text, frame.phase.value)
        self._drop()
        return self._tag(tag)

    def _close_early(self, frame: Frame, tag: Tag) -> Event:
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
        self._label = None

    def _close(self, end: int) -> None:
        """Take the innermost block from the stack into the path, or the text, that holds it."""
        span = self._stack.pop().span
        span.end = end
        (self._stack[-1].span.paths[-1].blocks if self._stack else self.blocks).append(span)


_HANDLERS = {
    Phase.HEAD: StructureMachine._tag_in_head,
    Phase.GOAL: StructureMachine._tag_in_goal,
    Phase.OUTLINE: StructureMachine._tag_in_outline,
    Phase.PATHS: StructureMachine._tag_between_paths,
    Phase.CONCLUSION: StructureMachine._tag_in_conclusion,
    Phase.AFTER: StructureMachine._tag_after_conclusion,
}
