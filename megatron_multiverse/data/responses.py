"""From the tokens of a response to its structure, or to the reason why it cannot be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_multiverse.data.prompts import RowError
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import StructureError
from megatron_multiverse.structure import MAX_DEPTH, Document, check_text, parse


@dataclass(frozen=True)
class Response:
    """A response that can be trained on."""

    ids: npt.NDArray[np.int64]
    """Its tokens, without an end token."""
    document: Document
    ended: bool
    """Whether its text ends with the end token."""


class ResponseReader:
    """Checks responses: their structure, and that no control token stands in them.

    Args:
        tokenizer: made the tokens.
    """

    def __init__(self, tokenizer: MultiverseTokenizer) -> None:
        self.tokenizer = tokenizer
        self._is_control = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
        self._is_control[list(tokenizer.control_tokens)] = True

    def read(self, text: str, ids: Sequence[int]) -> Response:
        """Check one response.

        Args:
            text: the response.
            ids: its tokens.

        Raises:
            RowError: a control token stands in it, or it breaks the grammar.
        """
        array, ended = self._without_end(ids)
        self._refuse_control_tokens(text, array)
        try:
            return Response(array, self._parse(array), ended)
        except StructureError as error:
            problem = error
        if problem.code == "label":
            # A token may span the end of a label and the text behind it. Tokenized in pieces, each label has its own.
            pieces = self.tokenizer.tokenize_response(text)
            if self.tokenizer.detokenize(pieces) == self.tokenizer.detokenize(ids):
                array, _ = self._without_end(pieces)
                try:
                    return Response(array, self._parse(array), ended)
                except StructureError as error:
                    problem = error
        raise _row_error(text, problem)

    def _parse(self, array: npt.NDArray[np.int64]) -> Document:
        return parse(array, self.tokenizer.structure_vocab, max_depth=MAX_DEPTH)

    def _without_end(self, ids: Sequence[int]) -> tuple[npt.NDArray[np.int64], bool]:
        array = np.array(ids, dtype=np.int64)
        ended = bool(array.size) and int(array[-1]) == self.tokenizer.eod
        if ended and array.size == 1:
            raise RowError("empty", "the response is the end token alone")
        return (array[:-1] if ended else array), ended

    def _refuse_control_tokens(self, text: str, array: npt.NDArray[np.int64]) -> None:
        found = np.flatnonzero(self._is_control[array])
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
