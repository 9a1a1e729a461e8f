"""The grammar of parallel blocks as an incremental state machine over token ids.

One machine reads one stream of tokens: a whole response (in `parser.parse`, for preprocessing) or one branch of a
running generation (in the engine, where `fork` makes the machines of the paths). It never raises: a broken rule is
counted in `malformed`, its tokens stay in the stream as plain text, and `problem` keeps the first one, from which the
strict parser makes an error.

What it accepts (arXiv 2506.09991, section 3; Multiverse-1K spells it with one newline in each gap)::

    text      := (token | block)*
    block     := <Parallel> \\n goal (\\n path)+ \\n <Conclusion> token* </Conclusion> \\n </Parallel>
    goal      := <Goal> (\\n outline)+ \\n </Goal>
    outline   := <Outline> \\n label token* </Outline>
    path      := <Path> \\n label text </Path>
    label     := digits and dots, the first a digit, then a colon

What happens to a tag out of place depends on where the stream stands. In the header of a block (up to `</Goal>`) the
block is given up, so its tags become plain text, and the tag is read again as part of the text around. In a conclusion
the block is closed there, and the tag is read again. Anywhere else the tag is plain text.

How it works: `_stack` holds the open blocks, outermost first, each with its phase. `push` sends a plain token to the
gap or the label it stands in, and a tag to the handler of the innermost block's phase (`_HANDLERS`), or to
`_tag_in_text` outside of blocks and inside paths.
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
        """How often each rule was broken, by its code."""
        self.problem: Problem | None = None
        """The first broken rule."""
        self.num_tokens = 0
        """Tokens read so far, which is the index of the next one. The parser starts at the prompt's length."""
        self.blocks: list[BlockSpan] = []
        """Closed blocks of this stream, outermost only; inner ones hang at their paths."""
        self.ended = False
        """A machine made by `fork` has read the `</Path>` of its path."""
        self._stack: list[Frame] = []
        self._think = 0  # 0: <Think> has not come, 1: it is open, 2: it is closed
        self._begins_in_thought = False  # and <Think> or </Think> has not come
        # A machine made by `fork` begins inside a path, at this depth and with this label.
        self._in_path = False
        self._base_depth = 0
        self._base_label = ""
        self._label: LabelReader | None = None  # set while a label is being read
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
        """Whether the next plain token counts, because it stands in a gap or a label; if not, it can be skipped."""
        return self._label is not None or (bool(self._stack) and self._stack[-1].phase in GAP_PHASES)

    @property
    def may_fork(self) -> bool:
        """Whether `</Goal>` may come next: an outline is closed, and its line has ended."""
        frame = self._stack[-1] if self._stack else None
        return frame is not None and frame.phase is Phase.GOAL and frame.gap == 1 and bool(frame.outlines)

    @property
    def in_thought(self) -> bool:
        """Whether a thought is open, be it one that the prompt opened."""
        return self._think == 1 or self._begins_in_thought

    def begin_in_thought(self) -> None:
        """The prompt ends inside of a thought, so `</Think>` may come first. It need not: what the prompt opened is not
        this stream's to close. Nor is `<Think>` out of place, which opens the thought here."""
        self._begins_in_thought = True

    def skip(self, count: int, last_id: int) -> None:
        """Take `count` plain tokens at once, the last of them `last_id`. Allowed only while not `watching`."""
        self.num_tokens += count
        self._last = last_id

    def take_text(self, token_id: int) -> bool:
        """Read one token if it is plain text with nothing open around it; False, and nothing, if it is not."""
        if self._stack or self._label is not None or token_id in self.vocab.tag_of:
            return False
        self.num_tokens += 1
        self._last = token_id
        return True

    def push(self, token_id: int) -> Event:
        """Read one token and say what it did."""
        if self.take_text(token_id):
            return Event.TEXT
        tag = self.vocab.tag_of.get(token_id)
        event = self._plain(token_id) if tag is None else self._tag(tag)
        self.num_tokens += 1
        self._last = token_id
        return event

    def fork(self, k: int) -> StructureMachine:
        """A machine for path `k` (from 0) of the block that just forked. Push it the path, gap newline first."""
        child = StructureMachine(self.vocab, max_depth=self.max_depth, max_paths=self.max_paths)
        child._base_depth = self.depth + 1
        child._in_path = True
        child._base_label = self._stack[-1].outlines[k].label
        return child

    def join(self) -> None:
        """All paths of the block ran in machines of their own and ended. Push the conclusion to this one next."""
        frame = self._stack[-1]
        # This stream holds none of their tokens, so their spans are empty; the grammar only asks how many there were.
        for outline in frame.outlines:
            frame.span.paths.append(PathSpan(self.num_tokens, self.num_tokens, self.num_tokens, outline.label))

    def closing_ids(self, *, of_prompt: bool = False) -> list[int]:
        """The ids that close everything this stream has open, innermost first, each tag on a line of its own.

        Args:
            of_prompt: close a thought that the prompt opened, too.
        """
        tags: list[Tag] = []
        for frame in reversed(self._stack):
            tags += CLOSERS[frame.phase]
        if self._in_path and not self.ended:
            tags.append(Tag.END_PATH)
        if self._think == 1 or (of_prompt and self._begins_in_thought):
            tags.append(Tag.END_THINK)
        ids: list[int] = []
        for tag in tags:
            if (ids[-1] if ids else self._last) != self.vocab.newline_id:
                ids.append(self.vocab.newline_id)
            ids.append(self.vocab.tag_ids[tag])
        return ids

    def finish(self) -> None:
        """The stream is over: count what is still open, close blocks that have paths, and give up the others."""
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
        """A plain token between two tags: one newline is right; anything else is counted, once per gap."""
        if token_id == self.vocab.newline_id and frame.gap == 0:
            frame.gap = 1
            return
        if frame.gap != -1:
            found = "a second newline" if token_id == self.vocab.newline_id else "text"
            self._note("gap", found, frame.gap_rule)
            frame.gap = -1
        # Text after </Conclusion> cannot belong to the block, so the block ends before it.
        if frame.phase is Phase.AFTER:
            self._close(self.num_tokens)

    def _end_label(self, label: LabelReader) -> None:
        """The label is complete, or known to be missing: check it and note it at its outline or path."""
        self._label = None
        frame = self._stack[-1] if self._stack else None
        expected = self._base_label if frame is None else frame.expected_label
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

    def _tag(self, tag: Tag) -> Event:
        """Read a tag. Handlers that give a block up or close it early call this again with the same tag."""
        # A tag ends a label that is still being read.
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
        """A tag where text is free: outside of blocks, or in the path of the block `frame`."""
        frame = self._stack[-1] if self._stack else None
        if tag is Tag.PARALLEL:
            return self._open_block(frame)
        # In a machine made by `fork` the stream itself is the path: it starts with the gap newline and <Path>.
        if frame is None and self._in_path and not self.ended:
            if tag is Tag.PATH and self.num_tokens <= 1:
                self._label = LabelReader(self.vocab, may_be_glued=False)
                return Event.TAG
            if tag is Tag.END_PATH:
                self.ended = True
                return Event.PATH_END
        if frame is not None and tag is Tag.END_PATH:
            frame.span.paths[-1].end = self.num_tokens + 1
            frame.phase, frame.gap = Phase.PATHS, 0
            return Event.PATH_END
        # <Think> and </Think> may come once each, in this order, and outside of blocks alone.
        if tag in (Tag.THINK, Tag.END_THINK) and frame is None and not self._in_path:
            due = Tag.THINK if self._think == 0 else Tag.END_THINK
            if self._begins_in_thought or (tag is due and self._think < 2):
                self._begins_in_thought = False
                self._think = 1 if tag is Tag.THINK else 2
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
            self._label = LabelReader(self.vocab, may_be_glued=True)
            return Event.TAG
        if tag is Tag.END_GOAL:
            self._check_gap(frame, tag)
            return self._fork_point(frame)
        return self._give_up(frame, tag)

    def _fork_point(self, frame: Frame) -> Event:
        """`</Goal>` has come: the block forks if its goal can be carried out.

        Every outline becomes a path whose first tokens the engine writes, so there must be at least one outline, each
        with the ids of a label, and no more than the engine can run. A goal that fails is given up, and the header
        stays in the stream as plain text: unlike other broken headers it had come to its last tag, so nothing is read
        again.
        """
        count = len(frame.outlines)
        if count == 0:
            code, expected = "no_outline", "at least one <Outline> before </Goal>"
        elif any(not outline.label_ids for outline in frame.outlines):
            code, expected = "unlabelled_outline", "a label in every outline"
        elif self.max_paths is not None and count > self.max_paths:
            code, expected = "too_many_paths", f"at most {self.max_paths} outlines"
        else:
            # `num_tokens` is still the index of </Goal> itself; the paths start after it.
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
        """A tag after `</Goal>` or after a `</Path>`: the next path, or the end of the paths.

        Once there is a path the block is real and is kept, whatever comes; too many or too few paths are only counted.
        """
        span = frame.span
        if tag is Tag.PATH:
            self._check_gap(frame, tag)
            if len(span.paths) == len(frame.outlines):
                self._note(
                    "path_count",
                    f"path {len(span.paths) + 1}",
                    f"{len(frame.outlines)} paths, one per outline",
                )
            # The gap newline before <Path> is the path's first token, so it starts where the goal or the path before
            # ended. Its end is known at its </Path>. `forced_end` moves on when the label has been read.
            start = span.region_end if span.paths else span.goal_end
            span.paths.append(PathSpan(start, -1, self.num_tokens + 1))
            frame.phase = Phase.PATH
            self._label = LabelReader(self.vocab, may_be_glued=False)
            return Event.TAG
        # Without a path there is nothing to conclude, and the block is given up like a broken header.
        if not span.paths:
            return self._give_up(frame, tag)
        if tag is Tag.CONCLUSION:
            self._check_gap(frame, tag)
            if len(span.paths) < len(frame.outlines):
                self._note("path_count", f"<Conclusion> after path {len(span.paths)}", f"{len(frame.outlines)} paths")
            frame.phase = Phase.CONCLUSION
            span.forced_end = self.num_tokens + 1
            return Event.TAG
        # The conclusion may be missing: the block is closed all the same, and counted.
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
            self._note("gap", f"{tag.text} directly after a tag", f"one newline before {tag.text}")

    def _give_up(self, frame: Frame, tag: Tag) -> Event:
        """The open header cannot take `tag`: the header becomes plain text, and `tag` is read again."""
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
        """Forget the innermost block: its tokens are plain text now."""
        self._stack.pop()
        self._label = None

    def _close(self, end: int) -> None:
        """The innermost block ends before token `end`: move it from the stack to the path or text that holds it."""
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
