"""New vocabulary rows: room for the tags, and a start for them better than noise.

A new tag row is the mean of the rows of the text pieces of the tag without its angle brackets ("/Path",
"Goal", ...), in the input embedding and, if untied, in the output layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_multiverse.config import ModelConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.weights import weight_state


def tag_pieces(tags: Sequence[str], tokenize: Callable[[str], list[int]]) -> list[list[int]]:
    """Ids of the text pieces of each tag, angle brackets stripped; `tokenize` must not know the tags."""
    return [tokenize(tag.removeprefix("<").removesuffix(">")) for tag in tags]


def vocab_matrices(model: Any) -> list[Tensor]:
    """The matrices with one row per token: input embedding, and output layer if untied."""
    matrices = [model.embedding.word_embeddings.weight]
    if not model.share_embeddings_and_output_weights:
        matrices.append(model.output_layer.weight)
    return matrices


@torch.no_grad()
def initialize_rows(model: nn.Module, pieces: Mapping[int, Sequence[int]]) -> None:
    """Set row `id` to the mean of the rows `pieces[id]`, in every vocabulary matrix.

    Raises:
        ConfigError: an id is outside the vocabulary, has no pieces, or is built from another new row.
    """
    for new, old in pieces.items():
        rows = vocab_matrices(model)[0].shape[0]
        if not old or any(not 0 <= i < rows for i in (new, *old)) or any(i in pieces for i in old):
            raise ConfigError(
                f"row {new} cannot be made from pieces {list(old)}: give at least one id, all ids below the "
                f"vocabulary size ({rows}), and no piece that is itself a new row"
            )
    for matrix in vocab_matrices(model):
        for new, old in pieces.items():
            mean = matrix[list(old)].to(torch.promote_types(matrix.dtype, torch.float32)).mean(dim=0)
            matrix[new] = mean.to(matrix.dtype)


@torch.no_grad()
def grow_vocab(model: nn.Module, config: ModelConfig, vocab_size: int) -> tuple[nn.Module, ModelConfig]:
    """A copy of the model with `vocab_size` rows; added rows are the mean of all old rows until they are set.

    Raises:
        ConfigError: vocab_size is smaller than the model's.
    """
    if vocab_size < config.vocab_size:
        raise ConfigError(f"vocab_size ({vocab_size}) must not be below the model's ({config.vocab_size})")
    grown_config = dataclasses.replace(config, vocab_size=vocab_size)
    parameter = next(model.parameters())
    grown = build_gpt_model(grown_config, dtype=parameter.dtype, device=parameter.device, initialize=False)
    target = weight_state(grown)
    for name, source in weight_state(model).items():
        if source.shape == target[name].shape:
            target[name].copy_(source)
        else:
            target[name][: len(source)] = source
            target[name][len(source) :] = source.float().mean(dim=0).to(source.dtype)
    return grown, grown_config
