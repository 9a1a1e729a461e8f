"""Loads a checkpoint of any format into a model, so that training and decoding need no conversion first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_multiverse.checkpoints.names.rules import check_divisible, slices
from megatron_multiverse.checkpoints.names.table import Entry
from megatron_multiverse.checkpoints.protocols import Source, pad_rows
from megatron_multiverse.checkpoints.sources import check_source, open_checkpoint
from megatron_multiverse.config import LayerConfig, ModelConfig, pad_vocab_size
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.model.gpt import build_gpt_model, first_layer_of
from megatron_multiverse.model.mcore import mark_tensor_parallel, pipeline_parallel_size, tensor_parallel_place
from megatron_multiverse.model.weights import weight_state
from megatron_multiverse.weight_names import plain_name


def load_checkpoint(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layers: LayerConfig | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Any, ModelConfig]:
    """Read a checkpoint of any format into a model; the arguments are those of `build_gpt_model`.

    Under tensor and pipeline parallelism the model is this rank's part, and only that part is kept in memory.

    Returns:
        The model, its weights converted to `dtype`, and the config of the whole model: its vocab_size counts the rows
        that were added so that the vocabulary can be cut for tensor parallelism.

    Raises:
        CheckpointError: the checkpoint is missing, damaged (also by its checksums) or does not give every parameter of
            the model.
        ConfigError: the model it holds is not supported, or what `layers` asks for cannot run on `device`.
    """
    source = open_checkpoint(folder)
    check_source(source)
    return model_from_source(source, dtype=dtype, device=device, layers=layers, compute_dtype=compute_dtype)


def copy_into(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter the values of a tensor of the same shape, on any device and of any dtype."""
    parameter.copy_(value)


@torch.no_grad()
def model_from_source(
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    write: Callable[[nn.Parameter, Tensor], None] = copy_into,
    **options: Any,
) -> tuple[Any, ModelConfig]:
    """This rank's part of a model and the whole model's config; weights are read and cut one tensor at a time.

    The vocabulary is padded with zero rows to a multiple of the tensor parallel size; dtype, device and the further
    options go to `build_gpt_model`.

    Args:
        source: where the weights come from.
        dtype: of the model's weights.
        device: where they go.
        write: puts a value into a parameter of the model, where that is more than copying it.
        options: see above.

    Raises:
        CheckpointError: the name table does not give every parameter of the model exactly once.
        ConfigError: the model cannot be cut for the tensor and pipeline parallel sizes.
    """
    tp, _ = tensor_parallel_place()
    config = dataclasses.replace(source.config, vocab_size=pad_vocab_size(source.config.vocab_size, tp))
    check_divisible(config, tp, pipeline_parallel_size())
    model = build_gpt_model(config, dtype=dtype, device=device, initialize=False, **options)
    missing = weight_state(model)
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    first_layer = first_layer_of(model)
    for entry in source.entries():
        names = names_on_stage(entry, first_layer, config)
        here = [name for name in names if name in missing]
        if here:  # other tensors belong to other stages and are not read
            part = part_of_rank(entry, source.read(entry), config)
            for name in here:
                del missing[name]
                write(parameters[name], part)
                if entry.rule != "replicated":
                    mark_tensor_parallel(parameters[name], dim=1 if entry.rule == "row" else 0)
    if missing:
        raise CheckpointError(f"{source.folder}: no tensor for {len(missing)} parameters, e.g. {min(missing)}")
    return model, config


def part_of_rank(entry: Entry, tensor: Tensor, config: ModelConfig) -> Tensor:
    """What this tensor parallel rank holds of a whole megatron-core tensor.

    Args:
        entry: says how it is cut.
        tensor: of the shape `entry.shape`.
        config: of the whole model, whose vocabulary is padded so that it can be cut.
    """
    tp, rank = tensor_parallel_place()
    return slices(entry.rule, pad_rows(entry, tensor, config.vocab_size), tp)[rank]


def names_on_stage(entry: Entry, first_layer: int, config: ModelConfig) -> list[str]:
    """Names that a tensor may have in a part of the model whose layers begin with `first_layer` and count from 0; the
    last pipeline stage keeps a copy of a tied embedding as its output layer."""
    if entry.layer is not None:
        return [entry.mcore.replace(f".{entry.layer}.", f".{entry.layer - first_layer}.", 1)]
    if entry.rule == "vocab" and config.share_embeddings_and_output_weights:
        return [entry.mcore, "output_layer.weight"]
    return [entry.mcore]
