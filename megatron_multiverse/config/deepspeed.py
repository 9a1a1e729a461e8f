"""What a run with `engine: deepspeed` asks of DeepSpeed, beside the settings that all engines share. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_multiverse.config.strict import check, check_choices


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """ZeRO: what the data parallel ranks share instead of each keeping all of it."""

    zero_stage: Literal[1, 2, 3] = 3
    """What is shared: 1 the optimizer's state, 2 also the gradients, 3 also the weights."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where the optimizer's state lies and is updated; cpu needs 16 bytes of host memory per parameter, over all ranks
    together, and gives up 12 on the GPUs."""
    offload_param: Literal["none", "cpu"] = "none"
    """Where weights wait until they are needed; cpu needs zero_stage 3."""
    config: str | None = None
    """A DeepSpeed JSON file with further settings (bucket sizes, thresholds, overlap). What it says of things that this
    configuration decides must agree with it, or be "auto"; training/deepspeed_settings.py lists what it may hold."""

    def __post_init__(self) -> None:
        check_choices(self, "deepspeed.")
        check(
            self.offload_param == "none" or self.zero_stage == 3,
            f"deepspeed.offload_param {self.offload_param} needs deepspeed.zero_stage 3, got {self.zero_stage}: only "
            "stage 3 takes weights apart",
        )
