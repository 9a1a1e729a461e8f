"""Text of a branch while it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_CHARACTER_BYTES = 4


class IncrementalDetokenizer:
    """Turns the ids of one branch into text piece by piece; the pieces add up to the text of all ids.

    A token can hold part of a character, and some tokenizers write a space depending on the token before. So each
    piece is the difference of two decodings of a short window, and it is held back while it ends inside a character,
    which no more than the last few tokens can do: bytes that are no text come out as replacement characters.

    Args:
        detokenize: ids -> text, tags kept (`MultiverseTokenizer.detokenize`).
    """

    def __init__(self, detokenize: Callable[[list[int]], str]) -> None:
        self._detokenize = detokenize
        self._ids: list[int] = []
        self._window = 0  # first token of the window
        self._done = 0  # first token whose text is not out yet

    @property
    def is_complete(self) -> bool:
        """Whether the text of all ids is out."""
        return self._done == len(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        """Take more ids; returns the text that is certain by now."""
        self._ids += ids
        return self._emit(final=False)

    def finish(self) -> str:
        """The rest, with a replacement character for an unfinished one."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        before = self._detokenize(self._ids[self._window : self._done])
        after = self._detokenize(self._ids[self._window :])
        end = len(self._ids)
        if after.endswith(_REPLACEMENT) and not final:
            # A character begins at most four tokens ago. What was before them is certain, unless it ends inside it.
            end = max(self._done, end - _CHARACTER_BYTES)
            head = self._detokenize(self._ids[self._window : end])
            if not after.startswith(head):
                return ""
            after = head
        if len(after) <= len(before):
            return ""
        self._window, self._done = self._done, end
        return after[len(before) :]
