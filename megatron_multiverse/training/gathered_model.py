"""The weights of a model that is spread over ranks, as one model folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_multiverse.checkpoints.load import names_on_stage
from megatron_multiverse.checkpoints.names.registry import find_family
from megatron_multiverse.checkpoints.names.rules import join
from megatron_multiverse.checkpoints.names.table import entries
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.model.gpt import first_layer_of
from megatron_multiverse.model.weights import write_weights
from megatron_multiverse.parallel.ranks import Ranks
from megatron_multiverse.weight_names import plain_name


@torch.no_grad()
def save_gathered(
    models: Sequence[Any],
    config: ModelConfig,
    folder: Path,
    ranks: Ranks,
    *,
    whole: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter,
) -> None:
    """Write the whole model from the first rank, where it must fit into the host's memory, tensor by tensor.

    Args:
        models: this rank's part of it.
        config: of the whole model; the rows that pad the vocabulary are left out.
        folder: made if it is missing; files of an earlier save in it are replaced.
        ranks: all of them.
        whole: what a parameter of this rank's part is, where several ranks share it; all of them call it.
    """
    parts = [
        ({plain_name(name): parameter for name, parameter in model.named_parameters()}, first_layer_of(model))
        for model in models
    ]
    first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    tensors: dict[str, Tensor] = {}
    for entry in entries(find_family(None, config), config):
        names = [(state, names_on_stage(entry, first, config)[0]) for state, first in parts]
        mine = next((whole(state[name]) for state, name in names if name in state), None)
        place = parallel_state.get_tensor_model_parallel_rank()
        found = ranks.gather_to_first(
            None if mine is None or not first_replica else (place, mine.detach().cpu().contiguous())
        )
        if ranks.is_first:
            shards = [tensor for _, tensor in sorted((x for x in found if x is not None), key=lambda x: x[0])]
            tensor = join(entry.rule, shards)
            tensors[entry.mcore] = tensor[: config.vocab_size].contiguous() if entry.rule == "vocab" else tensor
    ranks.first(lambda: write_weights(tensors, config, folder))
