"""Adds the twelve structure tags to a Hugging Face checkpoint while it is read.

The tokenizer gets the missing tags behind its vocabulary, in the official order. Their rows in the vocabulary matrices
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

from megatron_multiverse.conversion.hf_config import read_hf_config
from megatron_multiverse.conversion.hf_io import HFReader, Location
from megatron_multiverse.conversion.raw import read_tensor
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.structure import TAGS

VOCAB_MATRICES = ("model.embed_tokens.weight", "lm_head.weight")
ROW_MULTIPLE = 64


@dataclass(frozen=True)
class ControlTokens:
    """Which ids the tags have, and what their rows are made of."""

    vocab_size: int
    """Real size: number of token ids, tags included."""
    padded_vocab_size: int
    """Rows of the vocabulary matrices on the Hugging Face side."""
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
        folder: Hugging Face folder with tokenizer.json.
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
    padded = rows if size <= rows else -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
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


class ControlTokenReader(HFReader):
    """An HFReader whose vocabulary matrices have the rows of the tags.

    Attributes:
        plan: ids and rows.
        tokenizer: the tokenizer with the tags.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.plan, self.tokenizer = plan_control_tokens(folder, int(read_hf_config(folder)["vocab_size"]))

    def location(self, name: str) -> Location:
        """As HFReader.location, with the shape that `read` returns."""
        place = super().location(name)
        if name in VOCAB_MATRICES and place.shape[0] < self.plan.padded_vocab_size:
            return dataclasses.replace(place, shape=(self.plan.padded_vocab_size, *place.shape[1:]))
        return place

    def read(self, name: str) -> Tensor:
        """As HFReader.read, tags included."""
        place = super().location(name)
        if name not in VOCAB_MATRICES:
            return super().read(name)
        stored = read_tensor(place.file, place.offset, place.dtype, place.shape, name=name)
        return with_tag_rows(stored, self.plan)
