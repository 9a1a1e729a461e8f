"""What branches write, put in the order of the answer while it grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.inference.text.answer import answer_text
from megatron_multiverse.inference.text.detokenize import IncrementalDetokenizer
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server.logprobs import TokenLogprobs
from megatron_multiverse.structure import Tag


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is new of one answer."""

    index: int
    """Of the answer in its request."""
    text: str = ""
    thought: str = ""
    branch: str | None = None
    """Name of the branch that wrote it; None where the answer comes in the order of its text."""
    block: int = 0
    tokens: Sequence[TokenLogprobs] = ()
    """That are new; text lags behind them where it is not certain yet."""
    opens: bool = False
    """Whether it is the first piece of its branch."""
    closes: bool = False
    """Whether it is the last piece of its branch."""
    result: Result | None = None
    """The complete answer; such a piece is the last one of its index."""

    @property
    def ids(self) -> list[int]:
        """Of the new tokens."""
        return [entry.token for entry in self.tokens]


T = TypeVar("T")


@dataclass(eq=False)
class Stretch(Generic[T]):
    """What a branch writes up to its next block, and the paths of that block."""

    tokens: list[T] = field(default_factory=list)
    kids: list[BranchNode[T]] = field(default_factory=list)


@dataclass(eq=False)
class BranchNode(Generic[T]):
    """One branch as far as it has been heard of."""

    name: str
    """"" for the root, "2.1" for the first path of a block inside a second path."""
    block: int
    """Number of its block in the answer, from 1, in the order of forking; 0 for the root."""
    stretches: list[Stretch[T]] = field(default_factory=lambda: [Stretch()])
    ended: bool = False


class AnswerTree(Generic[T]):
    """Follows the branches of one answer.

    The engine names branches by their place, so the name of a path comes again in a later block of the same branch.
    It tells of all paths of a block, in their order, before any of them goes on, and of the branch that forked them
    only once all have ended.

    Args:
        end_path_id: id of `</Path>`, which ends the path that writes it.
        id_of: the id of a token; what tokens are is up to the caller.
    """

    def __init__(self, end_path_id: int, id_of: Callable[[T], int]) -> None:
        self.root: BranchNode[T] = BranchNode("", 0)
        self._id_of = id_of
        self.num_blocks = 0
        self._end_path_id = end_path_id
        self._by_name = {"": self.root}
        self._in_order = self._walk(self.root)

    def push(self, name: str, tokens: Sequence[T]) -> BranchNode[T]:
        """Take what a branch wrote; returns the branch."""
        node = self._by_name.get(name)
        if node is None:
            node = self._open(name)
        if kids := node.stretches[-1].kids:
            for kid in kids:
                self._end(kid)
            node.stretches.append(Stretch())
        node.stretches[-1].tokens += tokens
        if node is not self.root and self._id_of(tokens[-1]) == self._end_path_id:
            node.ended = True
        return node

    def take(self) -> list[T]:
        """The tokens that come next in the answer and were not taken yet: paths follow each other as in the text."""
        taken: list[T] = []
        for tokens in self._in_order:
            if not tokens:
                break
            taken += tokens
        return taken

    def finish(self) -> None:
        """Nothing more comes."""
        self._end(self.root)

    def _open(self, name: str) -> BranchNode[T]:
        siblings = self._by_name[name.rpartition(".")[0]].stretches[-1].kids
        if not siblings:
            self.num_blocks += 1
        node = self._by_name[name] = BranchNode(name, siblings[0].block if siblings else self.num_blocks)
        siblings.append(node)
        return node

    def _end(self, node: BranchNode[T]) -> None:
        node.ended = True
        if node is not self.root:
            self._by_name.pop(node.name, None)
        for kid in node.stretches[-1].kids:
            self._end(kid)

    def _walk(self, node: BranchNode[T]) -> Iterator[list[T]]:
        """The tokens of a branch in order, in pieces; an empty piece where more has to be waited for."""
        for stretch in node.stretches:  # more may come while this waits
            done = 0
            while True:
                if done < len(stretch.tokens):
                    piece = stretch.tokens[done:]
                    done += len(piece)
                    yield piece
                elif stretch.kids:
                    break
                elif node.ended:
                    return
                else:
                    yield []
            for kid in stretch.kids:
                yield from self._walk(kid)
            while stretch is node.stretches[-1] and not node.ended:
                yield []


class ThoughtSplitter:
    """Tells the thought of an answer, what stands between its Think tags, from the rest, as it comes.

    Args:
        tokenizer: of the model.
        split: whether to; if not, all text is content.
        in_thought: whether the answer begins in a thought. Models that open it again are heard once.
    """

    def __init__(self, tokenizer: MultiverseTokenizer, *, split: bool, in_thought: bool = False) -> None:
        self._tokenizer = tokenizer
        self.splits = split
        self._tags = tokenizer.structure_vocab.tag_of
        self._thinking = self._may_open_again = in_thought
        self._detokenizer = IncrementalDetokenizer(tokenizer.detokenize)

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is thought."""
        return self._thinking

    def push(self, ids: Sequence[int]) -> tuple[str, str]:
        """Take more ids; returns what is certain by now of (content, thought)."""
        if not self.splits:
            return self._detokenizer.push(ids), ""
        texts = ["", ""]
        start = 0
        for k, token in enumerate(ids):
            tag = self._tags.get(token)
            opens_again = tag is Tag.THINK and self._may_open_again
            if opens_again or tag is (Tag.END_THINK if self._thinking else Tag.THINK):
                texts[self._thinking] += self._detokenizer.push(ids[start:k]) + self._detokenizer.finish()
                self._detokenizer = IncrementalDetokenizer(self._tokenizer.detokenize)
                self._thinking, start = tag is Tag.THINK, k + 1
                self._may_open_again = False
        texts[self._thinking] += self._detokenizer.push(ids[start:])
        return texts[0], texts[1]

    def add(self, text: str) -> tuple[str, str]:
        """Text that comes next and is in no ids, after all that is held back."""
        text = self._detokenizer.finish() + text
        self._detokenizer = IncrementalDetokenizer(self._tokenizer.detokenize)
        return ("", text) if self._thinking else (text, "")

    def finish(self) -> tuple[str, str]:
        """The rest."""
        return self.add("")


def answer_texts(
    result: Result, tokenizer: MultiverseTokenizer, *, split: bool, in_thought: bool = False
) -> tuple[str, str]:
    """(content, thought) of a complete answer, without the stop texts that ended it or its paths.

    Args:
        result: the answer.
        tokenizer: of the model.
        split: whether to tell the thought apart; if not, all is content.
        in_thought: whether the answer begins in a thought.
    """
    if not split:
        return answer_text(result, tokenizer.detokenize), ""
    splitter, parts, done = ThoughtSplitter(tokenizer, split=True, in_thought=in_thought), [], 0
    for stop in result.stops:
        parts += [splitter.push(result.token_ids[done : stop.start]), splitter.add(stop.kept)]
        done = stop.end
    parts += [splitter.push(result.token_ids[done:]), splitter.finish()]
    content, thought = ("".join(texts) for texts in zip(*parts, strict=True))
    return content, thought
