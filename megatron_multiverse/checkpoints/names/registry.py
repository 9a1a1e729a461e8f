"""The families that can be converted, one file each. A new family is a new file and an entry in FAMILIES."""

from __future__ import annotations

from megatron_multiverse.checkpoints.names.llama import LLAMA
from megatron_multiverse.checkpoints.names.qwen2 import QWEN2
from megatron_multiverse.checkpoints.names.qwen3 import QWEN3
from megatron_multiverse.checkpoints.names.table import Family
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.errors import ConfigError

FAMILIES: dict[str, Family] = {family.name: family for family in (QWEN2, QWEN3, LLAMA)}


def find_family(name: str | None, config: ModelConfig) -> Family:
    """The family called `name`, or without a name the first one with the biases and norms of the model.

    Raises:
        ConfigError: there is no such family.
    """
    if name is not None:
        if name not in FAMILIES:
            raise ConfigError(f"unknown family {name!r}, supported: {', '.join(FAMILIES)}")
        return FAMILIES[name]
    for family in FAMILIES.values():
        same = (family.add_qkv_bias, family.qk_layernorm) == (config.add_qkv_bias, config.qk_layernorm)
        if same and (family.add_bias_linear or not config.add_bias_linear):
            return family
    raise ConfigError(
        f"no family has add_qkv_bias={config.add_qkv_bias} and qk_layernorm={config.qk_layernorm}; "
        f"supported: {', '.join(FAMILIES)}"
    )
