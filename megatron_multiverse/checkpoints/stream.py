"""Weights as a stream of named tensors, converted between the two namings. One tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from megatron_multiverse.checkpoints.hf_config import family_for, family_of, hf_config_to_model_config, read_hf_config
from megatron_multiverse.checkpoints.hf_io import HFReader
from megatron_multiverse.checkpoints.names import Entry, Family, entries
from megatron_multiverse.checkpoints.tensors import merge, split
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.errors import CheckpointError


def check_hf_tensors(reader: HFReader, wanted: Iterable[Entry]) -> None:
    """Every tensor of the table is there with its shape, and nothing else is.

    Raises:
        CheckpointError: naming the file and tensor.
    """
    expected = {name: shape for entry in wanted for name, shape in entry.hf}
    for name, shape in expected.items():
        place = reader.location(name)
        if place.shape != shape:
            raise CheckpointError(
                f"{place.file}: tensor {name} has shape {list(place.shape)}, config.json asks for {list(shape)}"
            )
    for name in sorted(reader.names() - expected.keys()):
        if not name.endswith("rotary_emb.inv_freq") and not _tied_copy(name, expected):
            raise CheckpointError(
                f"{reader.location(name).file}: tensor {name} is not part of the architecture that config.json "
                "describes; remove it or correct config.json"
            )


def _tied_copy(name: str, expected: Iterable[str]) -> bool:
    """An lm_head.weight beside tied embeddings is a copy that older transformers wrote."""
    return name == "lm_head.weight" and name not in expected


def mcore_state_from_hf(reader: HFReader) -> Iterator[tuple[str, Tensor]]:
    """Every megatron-core parameter of a Hugging Face folder, under the local spec's names.

    Raises:
        CheckpointError: a tensor is missing, too many, or of the wrong shape; nothing is yielded then.
    """
    hf_config = read_hf_config(reader.folder)
    config = hf_config_to_model_config(hf_config)
    plan = entries(family_of(hf_config), config)
    check_hf_tensors(reader, plan)
    return ((entry.mcore, merge(entry, [reader.read(n) for n, _ in entry.hf], config)) for entry in plan)


def hf_state_from_mcore(
    state: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    family: Family | None = None,
    hf_vocab_size: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor of a stream of megatron-core parameters (local spec's names, any order).

    Args:
        state: names and whole tensors.
        config: shape of the model.
        family: its family; default the one with these biases and norms.
        hf_vocab_size: rows of the vocabulary matrices to keep; default all.

    Raises:
        CheckpointError: a tensor is unknown, has the wrong shape, comes twice, or (at the end) is missing.
    """
    plan = {entry.mcore: entry for entry in entries(family or family_for(config), config, hf_vocab_size)}
    for name, tensor in state:
        entry = plan.pop(name, None)
        if entry is None:
            raise CheckpointError(f"tensor {name} is unknown to the family, or comes twice")
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensor.shape)}, the config asks for {list(entry.shape)}"
            )
        yield from zip((n for n, _ in entry.hf), split(entry, tensor, config), strict=True)
    if plan:
        raise CheckpointError(f"{len(plan)} tensors are missing, e.g. {next(iter(plan))}")
