"""Finds stop texts in a branch while it grows, wherever they fall on tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_multiverse.inference.text.detokenize import IncrementalDetokenizer
from megatron_multiverse.inference.text.result import StopMatch


class StopScanner:
    """Looks for stop texts in what a branch writes, drawn or forced, while it grows.

    After a block it begins anew: the text before the paths does not go on in the conclusion.

    Args:
        texts: the stop texts.
        detokenize: ids -> text, tags kept.
        include: whether a stop text belongs to what is kept (`SamplingParams.include_stop`).
    """

    def __init__(self, texts: Sequence[str], detokenize: Callable[[list[int]], str], *, include: bool = False) -> None:
        self._texts = texts
        self._include = include
        self._detokenize = detokenize
        self._longest = max(map(len, texts))
        self.begin(0)

    def begin(self, start: int) -> None:
        """The text begins at the branch's token `start`."""
        self._start = start
        self._detokenizer = IncrementalDetokenizer(self._detokenize)
        self._length = 0  # characters so far
        self._tail = ""  # the last of them, in which a stop text may have begun

    def find(self, branch_ids: Sequence[int], count: int, *, counts: bool = True) -> StopMatch | None:
        """Whether the last `count` tokens of the branch complete a stop text: the one that begins first.

        Args:
            branch_ids: all tokens of the branch.
            count: how many of them are new.
            counts: whether a stop text that ends here would end anything; if not, it is read over. Where in the tokens
                one stands takes as long to say as the branch is.
        """
        text = self._detokenizer.push(branch_ids[len(branch_ids) - count :])
        old, window = len(self._tail), self._tail + text
        found = [(window.find(stop, max(0, old - len(stop) + 1)), stop) for stop in self._texts] if text else []
        found = [(place, stop) for place, stop in found if place >= 0]
        offset = self._length - old
        self._length += len(text)
        self._tail = window[max(0, len(window) - self._longest + 1) :] if self._longest > 1 else ""
        if not found or not counts:
            return None
        place, stop = min(found, key=lambda match: match[0])
        return self._locate(branch_ids, offset + place, stop)

    def _locate(self, branch_ids: Sequence[int], place: int, stop: str) -> StopMatch:
        """The tokens that hold the text from character `place` on."""
        detokenizer = IncrementalDetokenizer(self._detokenize)
        text, whole, whole_text = "", self._start, 0
        for index in range(self._start, len(branch_ids)):
            text += detokenizer.push(branch_ids[index : index + 1])
            if len(text) > place:
                break
            if detokenizer.is_complete:
                whole, whole_text = index + 1, len(text)
        kept = text[whole_text:place] + (stop if self._include else "")
        return StopMatch(stop, whole, len(branch_ids), kept)
