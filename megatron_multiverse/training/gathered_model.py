"""The weights of a model that is spread over ranks, as one model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_multiverse.checkpoints.load import names_on_stage
from megatron_multiverse.checkpoints.names.registry import find_family
from megatron_multiverse.checkpoints.names.rules import join
from megatron_multiverse.checkpoints.names.table import entries
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.model.gpt import first_layer_of
from megatron_multiverse.model.weights import weight_state, write_weights
from megatron_multiverse.parallel.ranks import Ranks


@torch.no_grad()
def save_gathered(models: Sequence[Any], config: ModelConfig, folder: Path, ranks: Ranks) -> None:
    """Write the whole model from the first rank, where it must fit into the host's memory, tensor by tensor.

    Args:
        models: this rank's part of it.
        config: of the whole model; the rows that pad the vocabulary are left out.
        folder: made if it is missing; files of an earlier save in it are replaced.
        ranks: all of them.
    """
    parts = [(weight_state(model), first_layer_of(model)) for model in models]
    first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    tensors: dict[str, Tensor] = {}
    for entry in entries(find_family(None, config), config):
        names = [(state, names_on_stage(entry, first, config)[0]) for state, first in parts]
        mine = next((state[name] for state, name in names if name in state), None) if first_replica else None
        place = parallel_state.get_tensor_model_parallel_rank()
        found = ranks.gather_to_first(None if mine is None else (place, mine.cpu().contiguous()))
        if ranks.is_first:
            shards = [tensor for _, tensor in sorted((x for x in found if x is not None), key=lambda x: x[0])]
            whole = join(entry.rule, shards)
            tensors[entry.mcore] = whole[: config.vocab_size].contiguous() if entry.rule == "vocab" else whole
    ranks.first(lambda: write_weights(tensors, config, folder))
