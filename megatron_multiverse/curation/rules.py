"""What a sample has to pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_multiverse.curation.exchange import Effort
from megatron_multiverse.curation.token_counts import TokenCounter

Independence = Literal["lexical", "judge", "report"]
LosingBlocks = Literal["flatten", "shorten"]
FailedBlocks = Literal["set_aside", "flatten"]


@dataclass(frozen=True)
class Rules:
    """The rules of a run; `CurateConfig` explains those that a user chooses."""

    counter: TokenCounter
    max_attempts: int = 3
    max_distance: float = 0.2
    min_net_gain: float = 1.0
    losing_blocks: LosingBlocks = "flatten"
    failed_blocks: FailedBlocks = "set_aside"
    independence: Independence = "lexical"
    effort: Effort = "medium"
    is_cached: bool = True
