"""Adds the twelve structure tags to a checkpoint while it is read.

The missing tags get ids after the tokenizer's vocabulary, in the official order. Their rows in the vocabulary matrices
(input embedding, and output layer if untied) are the mean of the rows of the text pieces of the tag without its angle
brackets ("/Path", "Goal"), as in the official training code. Spare rows that the matrices already have are used;
otherwise they grow to a multiple of 64, and rows without a token are zero.

A checkpoint whose tokenizer knows the tags (Multiverse-32B: 151677 tokens in 151680 rows) is left as it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.names.table import Entry, entries
from megatron_multiverse.checkpoints.protocols import Source
from megatron_multiverse.config import pad_vocab_size
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.structure import TAGS

ROW_MULTIPLE = 64


@dataclass(frozen=True)
class ControlTokens:
    """Which ids the tags have, and what their rows are made of."""

    vocab_size: int
    """Real size: number of token ids, tags included."""
    padded_vocab_size: int
    """Rows of the vocabulary matrices, before any padding for tensor parallelism."""
    tag_ids: dict[str, int]
    """Id of each tag."""
    pieces: dict[int, tuple[int, ...]]
    """Ids of the text pieces of each tag that was added; empty if there was nothing to add."""

    def record(self) -> dict[str, Any]:
        """What a converted checkpoint notes about its vocabulary, as JSON values."""
        return {"vocab_size": self.vocab_size, "padded_vocab_size": self.padded_vocab_size, "tag_ids": self.tag_ids}


def plan_control_tokens(folder: str | Path, rows: int) -> tuple[ControlTokens, HuggingFaceTokenizer]:
    """Decide ids and rows for the tags.

    Args:
        folder: where tokenizer.json is.
        rows: rows of its vocabulary matrices.

    Returns:
        The plan, and the tokenizer with the tags.

    Raises:
        CheckpointError: there is no tokenizer.json, or it has more tokens than the matrices have rows.
    """
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json, which --add-control-tokens extends; "
            "save one there with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    before = Tokenizer.from_file(str(file))
    old_size = 1 + max(before.get_vocab(with_added_tokens=True).values())
    if old_size > rows:
        raise CheckpointError(
            f"{file} has ids up to {old_size - 1}, but the vocabulary matrices of {folder} have {rows} rows: "
            "tokenizer and weights do not belong together"
        )
    tokenizer = HuggingFaceTokenizer(folder)
    ids = dict(zip(TAGS, tokenizer.structure_vocab.tag_ids, strict=True))
    pieces = {
        ids[tag]: tuple(before.encode(tag.removeprefix("<").removesuffix(">"), add_special_tokens=False).ids)
        for tag in TAGS
        if before.token_to_id(tag) is None
    }
    size = tokenizer.vocab_size
    padded = rows if size <= rows else pad_vocab_size(size, ROW_MULTIPLE)
    return ControlTokens(size, padded, ids, pieces), tokenizer


@torch.no_grad()
def with_tag_rows(matrix: Tensor, plan: ControlTokens) -> Tensor:
    """A vocabulary matrix [rows, hidden] with the rows of the tags, [padded_vocab_size, hidden]."""
    if len(matrix) < plan.padded_vocab_size:
        grown = matrix.new_zeros(plan.padded_vocab_size, *matrix.shape[1:])
        grown[: len(matrix)] = matrix
        matrix = grown
    for new, old in plan.pieces.items():
        mean = matrix[list(old)].to(torch.promote_types(matrix.dtype, torch.float32)).mean(dim=0)
        matrix[new] = mean.to(matrix.dtype)
    return matrix


class ControlTokenSource:
    """Another source with the rows of the tags in its vocabulary matrices.

    Args:
        source: the checkpoint as it is.
        tokenizer_model: folder with tokenizer.json; default the checkpoint's own.

    Attributes:
        plan: ids and rows.
        tokenizer: the tokenizer with the tags.
    """

    def __init__(self, source: Source, tokenizer_model: str | Path | None = None) -> None:
        self.source = source
        self.plan, self.tokenizer = plan_control_tokens(tokenizer_model or source.folder, source.config.vocab_size)
        self.folder, self.files, self.family = source.folder, source.files, source.family
        self.hf_config = source.hf_config
        self.config = dataclasses.replace(source.config, vocab_size=self.plan.padded_vocab_size)
        self._original = {entry.mcore: entry for entry in source.entries()}
        self._entries = entries(self.family, self.config)

    def entries(self) -> list[Entry]:
        """All tensors, in the order of the network."""
        return self._entries

    def dtype(self, entry: Entry) -> torch.dtype:
        """Dtype of a tensor on disk."""
        return self.source.dtype(self._original[entry.mcore])

    def where(self, entry: Entry) -> Path:
        """A file that holds the tensor as it was."""
        return self.source.where(self._original[entry.mcore])

    def read(self, entry: Entry) -> Tensor:
        """One whole tensor, the rows of the tags included."""
        tensor = self.source.read(self._original[entry.mcore])
        return with_tag_rows(tensor, self.plan) if entry.rule == "vocab" else tensor
