"""What of a growing answer is certain and can be sent: in the order of its text, or as its branches write.

A stop text is no part of the text, so what could become one is held back until it is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.inference.text.detokenize import IncrementalDetokenizer
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server.answer import AnswerTree, BranchNode, Piece, ThoughtSplitter, answer_texts
from megatron_multiverse.server.batch import Write
from megatron_multiverse.server.fields import GenerationFields
from megatron_multiverse.server.logprobs import TokenLogprobs
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.shapes import check_result
from megatron_multiverse.structure import Tag


class _Told(NamedTuple):
    """A token of a branch."""

    token: TokenLogprobs
    stop: tuple[int, str] | None
    """Where the token is the first after a stop text: see `Write`."""


class _Pieces:
    """What both orders of the pieces of one answer need.

    Args:
        index: of the answer in its request.
        model: that is served.
        fields: of the request.
        in_thought: whether the answer begins in a thought.
    """

    def __init__(self, index: int, model: ServedModel, fields: GenerationFields, *, in_thought: bool = False) -> None:
        self._index = index
        self._in_thought = in_thought
        self._tokenizer: MultiverseTokenizer = model.tokenizer
        end_path = self._tokenizer.structure_vocab.tag_ids[Tag.END_PATH]
        self._tree: AnswerTree[_Told] = AnswerTree(end_path, lambda told: told.token.token)
        stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        self._held_back = max((len(text) - 1 for text in stops), default=0)
        """Characters at the end of a text that may be the beginning of a stop text."""


class LinearPieces(_Pieces):
    """Pieces of one answer in the order of its text: what paths write waits until those before them have ended."""

    def __init__(self, index: int, model: ServedModel, fields: GenerationFields, *, in_thought: bool = False) -> None:
        super().__init__(index, model, fields, in_thought=in_thought)
        self._splitter = ThoughtSplitter(model.tokenizer, split=fields.splits_thought, in_thought=in_thought)
        self._ids: list[int] = []  # that were taken from the tree
        self._texts = ["", ""]  # what is known of content and thought
        self._sent = [0, 0]  # characters of each that are out

    def push(self, writes: Sequence[Write], result: Result | None) -> list[Piece]:
        """Take what branches wrote, and the answer if it is complete; returns what can be sent now.

        Raises:
            ApiError: the answer is an error.
        """
        for write in writes:
            self._tree.push(write.branch, _told(write))
        if result is not None:
            self._tree.finish()
        taken = self._tree.take()
        self._read(taken)
        held_back = self._held_back if result is None else 0
        if result is not None:
            check_result(result)
            self._add(self._splitter.finish())
            if result.stops:
                splits = self._splitter.splits
                self._texts = list(answer_texts(result, self._tokenizer, split=splits, in_thought=self._in_thought))
        text, thought = self._new(0, held_back), self._new(1, held_back)
        if not (text or thought or taken or result):
            return []
        tokens = [told.token for told in taken]
        return [Piece(index=self._index, text=text, thought=thought, tokens=tokens, result=result)]

    def _read(self, taken: Sequence[_Told]) -> None:
        start = 0
        ids = [told.token.token for told in taken]
        for k, told in enumerate(taken):
            if told.stop is not None:
                self._add(self._splitter.push(ids[start:k]))
                self._ids += ids[start:k]
                self._cut(*told.stop)
                start = k
        self._add(self._splitter.push(ids[start:]))
        self._ids += ids[start:]

    def _cut(self, count: int, kept: str) -> None:
        """Take back the text of the last tokens, but for what stands before the stop text in them."""
        self._add(self._splitter.finish())
        gone = len(self._tokenizer.detokenize(self._ids[-count:])) - len(kept)
        which = self._splitter.is_thinking
        self._texts[which] = self._texts[which][: len(self._texts[which]) - gone]

    def _add(self, texts: tuple[str, str]) -> None:
        self._texts = [known + new for known, new in zip(self._texts, texts, strict=True)]

    def _new(self, which: int, held_back: int) -> str:
        text, start = self._texts[which], self._sent[which]
        self._sent[which] = max(start, len(text) - held_back)
        return text[start : self._sent[which]]


@dataclass(eq=False)
class _Open:
    """A branch that may go on writing."""

    detokenizer: IncrementalDetokenizer
    ids: list[int] = field(default_factory=list)
    held: str = ""
    """Text that is not out yet."""


class BranchPieces(_Pieces):
    """Pieces of one answer as its branches write, each with the name of its branch."""

    def __init__(self, index: int, model: ServedModel, fields: GenerationFields, *, in_thought: bool = False) -> None:
        super().__init__(index, model, fields, in_thought=in_thought)
        self._stops_in_paths = fields.ours.stop_in_branches
        self._open: dict[BranchNode[_Told], _Open] = {}
        self._stopped = False  # whether the stop text that ended the answer has been taken away

    def push(self, writes: Sequence[Write], result: Result | None) -> list[Piece]:
        """Take what branches wrote, and the answer if it is complete; returns what can be sent now.

        Raises:
            ApiError: the answer is an error.
        """
        found = []
        # A stop text is told of by what closes its branch, or by the answer: later, but at once with its last token.
        stopping = {write.branch for write in writes if write.stop is not None} | ({""} if result else set())
        for write in writes:
            node = self._tree.push(write.branch, _told(write))
            opens = node not in self._open
            if opens and node.block:
                found += self._let_go(write.branch.rpartition(".")[0])
            branch = self._open.setdefault(node, _Open(IncrementalDetokenizer(self._tokenizer.detokenize)))
            text = self._text(node, branch, write, all_waits=write.branch in stopping)
            found.append(
                Piece(
                    index=self._index,
                    text=text,
                    branch=write.branch,
                    block=node.block,
                    tokens=write.tokens,
                    opens=opens and node.block > 0,
                    closes=node.ended,
                )
            )
        if result is not None:
            check_result(result)
            found.append(Piece(index=self._index, text=self._rest(result), branch="", result=result))
        return found

    def _text(self, node: BranchNode[_Told], branch: _Open, write: Write, *, all_waits: bool) -> str:
        """What can be sent of a branch once it has written more."""
        if write.stop is not None:
            self._cut(branch, *write.stop)
            self._stopped |= not node.block
        branch.ids += write.ids
        branch.held += branch.detokenizer.push(write.ids)
        if node.ended:
            branch.held += branch.detokenizer.finish()
        held_back = self._held_back if self._stops_in_paths or not node.block else 0
        certain = max(0, len(branch.held) - held_back)
        if node.ended:
            certain = len(branch.held)
        elif all_waits:
            certain = 0
        text, branch.held = branch.held[:certain], branch.held[certain:]
        return text

    def _cut(self, branch: _Open, count: int, kept: str) -> None:
        branch.held += branch.detokenizer.finish()
        branch.detokenizer = IncrementalDetokenizer(self._tokenizer.detokenize)
        gone = len(self._tokenizer.detokenize(branch.ids[-count:])) - len(kept)
        branch.held = branch.held[: len(branch.held) - gone]

    def _let_go(self, name: str) -> list[Piece]:
        """What a branch holds back when it forks: no stop text goes on after a block."""
        for node, branch in self._open.items():
            if node.name == name and not node.ended and branch.held:
                text, branch.held = branch.held, ""
                return [Piece(index=self._index, text=text, branch=name, block=node.block)]
        return []

    def _rest(self, result: Result) -> str:
        branch = self._open.get(self._tree.root)
        if branch is None:
            return ""
        if isinstance(result.stop_reason, str) and result.stops and not self._stopped:
            stop = result.stops[-1]
            self._cut(branch, stop.end - stop.start, stop.kept)
        return branch.held + branch.detokenizer.finish()


def _told(write: Write) -> list[_Told]:
    return [_Told(token, None if k else write.stop) for k, token in enumerate(write.tokens)]
