"""Any checkpoint as a model in memory: what training starts from and what is decoded with need no conversion first."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megatron_multiverse.checkpoints.endpoints import Source, pad_rows
from megatron_multiverse.checkpoints.hf_endpoint import HFSource
from megatron_multiverse.checkpoints.mcore_source import McoreSource
from megatron_multiverse.checkpoints.model_folder import ModelFolderSource, is_model_folder
from megatron_multiverse.checkpoints.names import Entry
from megatron_multiverse.checkpoints.tensors import slices
from megatron_multiverse.config import LayerConfig, ModelConfig
from megatron_multiverse.errors import CheckpointError


def open_checkpoint(folder: str | Path, *, trust_pickle: bool = False) -> Source:
    """A checkpoint of any supported layout as a source of tensors: Hugging Face, megatron-core's torch_dist and
    mp_rank_XX, or a model folder of this package.

    Raises:
        CheckpointError: it is none of them, or incomplete.
        ConfigError: the model it holds is not supported.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; give the folder of a checkpoint")
    if is_model_folder(path):
        return ModelFolderSource(path)
    if (path / "config.json").is_file() and not (path / "conversion.json").is_file():
        return HFSource(path)
    return McoreSource(path, trust_pickle=trust_pickle)


def load_checkpoint(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layers: LayerConfig | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Any, ModelConfig]:
    """Read a checkpoint of any supported layout into a model; the arguments are those of `build_gpt_model`.

    Under tensor and pipeline parallelism the model is this rank's part, and only that part is kept in memory.

    Returns:
        The model, its weights converted to `dtype`, and its config.
    """
    source = open_checkpoint(folder)
    model = model_from_source(source, dtype=dtype, device=device, layers=layers, compute_dtype=compute_dtype)
    return model, source.config


@torch.no_grad()
def model_from_source(
    source: Source, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **options: Any
) -> Any:
    """This rank's part of a model, its weights read and cut one tensor at a time.

    The vocabulary is padded with zero rows to a multiple of the tensor parallel size; dtype, device and the further
    options go to `build_gpt_model`.

    Raises:
        CheckpointError: the name table does not give every parameter of the model exactly once.
    """
    from megatron_multiverse.model.gpt import build_gpt_model  # first: imports megatron-core quietly

    # isort: split
    from megatron.core import parallel_state

    from megatron_multiverse.model.mcore import ensure_parallel_state
    from megatron_multiverse.model.weights import weight_state

    ensure_parallel_state()
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    stages, stage = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    rows = -(-source.config.vocab_size // tp) * tp
    config = dataclasses.replace(source.config, vocab_size=rows)
    model = build_gpt_model(config, dtype=dtype, device=device, initialize=False, **options)
    missing = weight_state(model)
    first_layer = stage * source.config.num_layers // stages
    for entry in source.entries():
        names = _local_names(entry, first_layer, source.config)
        targets = [missing.pop(name) for name in names if name in missing]
        if targets:  # other tensors belong to other stages and are not read
            part = slices(entry.rule, pad_rows(entry, source.read(entry), rows), tp)[rank]
            for target in targets:
                target.copy_(part)
    if missing:
        raise CheckpointError(f"{source.folder}: no tensor for {len(missing)} parameters, e.g. {min(missing)}")
    return model


def _local_names(entry: Entry, first_layer: int, config: ModelConfig) -> list[str]:
    """Names that a tensor may have on a rank: layers count from the stage's first, tied embeddings may come twice."""
    if entry.layer is not None:
        return [entry.mcore.replace(f".{entry.layer}.", f".{entry.layer - first_layer}.", 1)]
    if entry.rule == "vocab" and config.share_embeddings_and_output_weights:
        return [entry.mcore, "output_layer.weight"]
    return [entry.mcore]
