"""The families that can be converted, one file each. A new family is a new file and an entry in FAMILIES."""

from __future__ import annotations

from megatron_multiverse.checkpoints.families.llama import LLAMA
from megatron_multiverse.checkpoints.families.qwen2 import QWEN2
from megatron_multiverse.checkpoints.families.qwen3 import QWEN3
from megatron_multiverse.checkpoints.names import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (QWEN2, QWEN3, LLAMA)}
