"""Lengths in tokens: by the tokenizer a model will be trained with, or roughly, without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_multiverse.curation.trees import plain_text, think
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.structure import TEXT_ID, Block, Document, Tag, lex, parse

_CHARACTERS_PER_TOKEN = 4


class TokenCounter(Protocol):
    """Cuts responses into tokens, each tag one token."""

    label: str
    """Says in reports what was counted."""

    def document(self, response: str) -> Document:
        """The structure of a response, in tokens.

        Raises:
            StructureError: it breaks the grammar.
        """


class TrainingTokens:
    """Counts the tokens of the tokenizer that preprocessing will use.

    Args:
        tokenizer: with the tags in its vocabulary.
        name: as the user gave it.
    """

    def __init__(self, tokenizer: MultiverseTokenizer, name: str) -> None:
        self.tokenizer = tokenizer
        self.label = f"tokens of {name}"

    def document(self, response: str) -> Document:
        """See `TokenCounter`."""
        return parse(self.tokenizer.tokenize_response(response), self.tokenizer.structure_vocab)


class RoughTokens:
    """Counts four characters as one token, so that no tokenizer is needed."""

    label = f"rough tokens of {_CHARACTERS_PER_TOKEN} characters"

    def document(self, response: str) -> Document:
        """See `TokenCounter`."""
        ids, offsets, vocab = lex(response)
        lengths = np.diff(np.array([*offsets, len(response)], dtype=np.int64))
        tokens = np.where(np.equal(ids, TEXT_ID), -(-lengths // _CHARACTERS_PER_TOKEN), 1)
        return parse(np.repeat(ids, tokens), vocab)


def count_plain(parts: Sequence[str | Block], counter: TokenCounter) -> int:
    """Tokens of the same trajectory written sequentially, Think tags included."""
    return counter.document("\n".join([Tag.THINK.text, plain_text(parts), Tag.END_THINK.text])).num_tokens


def tree_document(parts: Sequence[str | Block], counter: TokenCounter) -> Document:
    """The structure of a tree, as it will be written."""
    return counter.document(think(parts))
