"""Adds the twelve structure tags to a checkpoint while it is read.

The missing tags get ids after the tokenizer's vocabulary, in the official order. Their rows in the vocabulary matrices
(input embedding, and output layer if untied) are the mean of the rows of the text pieces of the tag without its angle
brackets ("/Path", "Goal"), as in the official training code. Spare rows that the matrices already have are used;
otherwise they grow to a multiple of 64, and rows without a token are zero.

Training adds the tags too, at the same ids. So in weights that come from training such spare rows may be trained, even
where the tokenizer at hand does not know the tags: they are kept unless the caller says otherwise.

A checkpoint whose tokenizer knows the tags (Multiverse-32B: 151677 tokens in 151680 rows) is left as it is.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.formats.hf_assets import check_rows
from megatron_multiverse.checkpoints.names.table import Entry, entries
from megatron_multiverse.checkpoints.protocols import Source
from megatron_multiverse.config import pad_vocab_size
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.errors import CheckpointError, ConfigError
from megatron_multiverse.structure import TAGS

logger = logging.getLogger(__name__)

ROW_MULTIPLE = 64
TagRows = Literal["auto", "mean", "keep"]
"""What becomes of rows that the matrices already have for tags that the tokenizer lacks: see `ConvertConfig`."""


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
    check_rows(folder, rows)
    before = Tokenizer.from_file(str(file))
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
def with_tag_rows(matrix: Tensor, plan: ControlTokens, *, keep: bool = False) -> Tensor:
    """A vocabulary matrix [rows, hidden] with the rows of the tags, [padded_vocab_size, hidden].

    With `keep` only rows of zeros, which are padding, and rows that are new are made from the pieces of the tags.
    """
    if len(matrix) < plan.padded_vocab_size:
        grown = matrix.new_zeros(plan.padded_vocab_size, *matrix.shape[1:])
        grown[: len(matrix)] = matrix
        matrix = grown
    for new, old in plan.pieces.items():
        if keep and bool(matrix[new].any()):
            continue
        mean = matrix[list(old)].to(torch.promote_types(matrix.dtype, torch.float32)).mean(dim=0)
        matrix[new] = mean.to(matrix.dtype)
    return matrix


def tokenizer_folder(source: Source, given: str | Path | None = None) -> Path | None:
    """The folder whose tokenizer goes with a checkpoint: the given one, or the checkpoint's own; None without any.

    Raises:
        ConfigError: the given one has no tokenizer.
    """
    if given is None:
        return next((folder for folder in source.asset_folders if _has_tokenizer(folder)), None)
    if not _has_tokenizer(Path(given)):
        raise ConfigError(
            f"--tokenizer-model {given} is no folder with a tokenizer.json or tokenizer.model: give the folder of a "
            "tokenizer, or leave it out"
        )
    return Path(given)


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()


class ControlTokenSource:
    """Another source with the rows of the tags in its vocabulary matrices.

    Args:
        source: the checkpoint as it is.
        tokenizer_model: folder with tokenizer.json; default the checkpoint's own.
        tag_rows: what becomes of rows that the matrices already have for the tags.

    Attributes:
        plan: ids and rows.
        tokenizer: the tokenizer with the tags.
    """

    def __init__(self, source: Source, tokenizer_model: str | Path | None = None, tag_rows: TagRows = "auto") -> None:
        self.source = source
        folder = tokenizer_folder(source, tokenizer_model) or source.folder
        self.plan, self.tokenizer = plan_control_tokens(folder, source.config.vocab_size)
        self.keep = tag_rows == "keep" or (tag_rows == "auto" and source.trained)
        present = [token for token in self.plan.pieces if token < source.config.vocab_size]
        if present and tag_rows == "auto" and source.trained:
            logger.warning(
                "%s comes from training and has rows %d to %d, which become those of the tags: they are kept as they "
                "are, but for rows of zeros; --tag-rows mean initialises all of them anew",
                source.folder, min(present), max(present),
            )  # fmt: skip
        self.folder, self.files, self.family = source.folder, source.files, source.family
        self.described_by, self.asset_folders, self.trained = source.described_by, source.asset_folders, source.trained
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
        return with_tag_rows(tensor, self.plan, keep=self.keep) if entry.rule == "vocab" else tensor
