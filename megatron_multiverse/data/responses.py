"""From the tokens of a response to its structure, or to the reason why it cannot be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.data.turns import RowError
from megatron_multiverse.errors import StructureError
from megatron_multiverse.structure import MAX_DEPTH, BatchMeter, Statistics, check_text, measure, parse

IdArray = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Response:
    """A response that can be trained on."""

    ids: IdArray
    """Its tokens, without an end token."""
    statistics: Statistics
    ended: bool
    """Whether its text ends with the end token."""


class ResponseReader:
    """Checks responses: their structure, and that no control token stands in them.

    Args:
        tokenizer: made the tokens.
    """

    def __init__(self, tokenizer: MultiverseTokenizer) -> None:
        self.tokenizer = tokenizer
        self._first_control = min(tokenizer.control_tokens, default=0)
        self._is_control = np.zeros(max(tokenizer.control_tokens, default=-1) + 1, dtype=np.bool_)
        self._is_control[list(tokenizer.control_tokens)] = True
        self._meter = BatchMeter(tokenizer.structure_vocab, max_depth=MAX_DEPTH)

    def read_batch(self, texts: Sequence[str], encoded: Sequence[IdArray]) -> list[Response | RowError]:
        """Check many responses: those without any fault all at once, each of the others by `read`.

        Args:
            texts: the responses.
            encoded: the tokens of each.

        Returns:
            For each response what `read` returns or raises.
        """
        if not texts:
            return []
        ended = [bool(ids.size) and int(ids[-1]) == self.tokenizer.eod for ids in encoded]
        bodies = [ids[:-1] if end else ids for ids, end in zip(encoded, ended, strict=True)]
        joined, lengths = np.concatenate(bodies), np.array([body.size for body in bodies])
        batch = self._meter.measure(joined, lengths)
        control = self._find_control_tokens(joined)
        batch.is_valid[np.searchsorted(np.cumsum(lengths), control, side="right")] = False
        batch.is_valid[lengths == 0] = False
        return [
            Response(body, statistics, end) if statistics is not None else self._read_or_error(text, ids)
            for text, ids, body, end, statistics in zip(texts, encoded, bodies, ended, batch.rows(), strict=True)
        ]

    def _read_or_error(self, text: str, ids: IdArray) -> Response | RowError:
        try:
            return self.read(text, ids)
        except RowError as error:
            return error

    def read(self, text: str, ids: Sequence[int] | IdArray) -> Response:
        """Check one response.

        Args:
            text: the response.
            ids: its tokens.

        Raises:
            RowError: a control token stands in it, or it breaks the grammar.
        """
        array, ended = self._without_end(np.asarray(ids, dtype=np.int64))
        self._refuse_control_tokens(text, array)
        try:
            return Response(array, self._measure(array), ended)
        except StructureError as error:
            problem = error
        if problem.code == "label":
            # A token may span the end of a label and the text after it. Tokenized in pieces, each label has its own.
            pieces = self.tokenizer.tokenize_response(text)
            if self.tokenizer.detokenize(pieces) == self.tokenizer.detokenize(cast(Sequence[int], ids)):
                array, _ = self._without_end(np.array(pieces, dtype=np.int64))
                try:
                    return Response(array, self._measure(array), ended)
                except StructureError as error:
                    problem = error
        raise _row_error(text, problem)

    def _measure(self, array: IdArray) -> Statistics:
        return measure(parse(array, self.tokenizer.structure_vocab, max_depth=MAX_DEPTH))

    def _without_end(self, array: IdArray) -> tuple[IdArray, bool]:
        ended = bool(array.size) and int(array[-1]) == self.tokenizer.eod
        if ended and array.size == 1:
            raise RowError("empty", "the response is the end token alone")
        return (array[:-1] if ended else array), ended

    def _find_control_tokens(self, array: IdArray) -> npt.NDArray[np.int64]:
        # They usually stand side by side in a vocabulary, so few ids are looked up.
        near = np.flatnonzero((array >= self._first_control) & (array < len(self._is_control)))
        return near[self._is_control[array[near]]]

    def _refuse_control_tokens(self, text: str, array: IdArray) -> None:
        found = self._find_control_tokens(array)
        if not found.size:
            return
        index = int(found[0])
        names, eod = self.tokenizer.control_tokens, self.tokenizer.eod
        name = names[int(array[index])]
        char_index = text.find(name)
        may = f"; only {names[eod]} may, at the very end" if eod in names else ""
        raise RowError(
            "control_token",
            f"the control token {name} stands in the response{may}",
            token_index=index,
            char_index=char_index if char_index >= 0 else None,
        )


def _row_error(text: str, error: StructureError) -> RowError:
    """The place in the text as it was given: a tokenizer may have changed it, so the tokens cannot tell."""
    found, char_index = error.found, None
    try:
        check_text(text)
    except StructureError as in_text:
        if in_text.code == error.code:
            found, char_index = in_text.found, in_text.char_index
    message = f"found {found}, expected {error.expected}"
    return RowError(error.code, message, token_index=error.token_index, char_index=char_index)
