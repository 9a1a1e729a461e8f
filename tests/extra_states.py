"""What a Megatron that uses TransformerEngine asks of a torch_dist checkpoint beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_multiverse.model.cpu import device_neutral_cuda
from megatron_multiverse.model.mcore import ensure_parallel_state


def assert_extra_states_load(folder: Path, modules: Sequence[str], layers: int) -> None:
    """megatron-core loads the (empty) extra states of each layer's modules and of the final norm.

    Its own exception passes through if one of them is not in the checkpoint.
    """
    wanted = {
        f"decoder.layers.{layer}.{module}": ShardedObject(
            f"decoder.layers.{module}._extra_state", None, (layers,), (layer,), replica_id=0
        )
        for module in modules
        for layer in range(layers)
    }
    wanted["decoder.final_layernorm"] = ShardedObject("decoder.final_layernorm._extra_state", None, (1,), (0,))
    names = set(wanted)
    ensure_parallel_state()
    with device_neutral_cuda():
        loaded = dist_checkpointing.load({"model": wanted}, str(folder))["model"]
    assert loaded == dict.fromkeys(names)
