"""An engine from a checkpoint: what tools, the server, evaluation and rollouts start from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config.engine import EngineConfig
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.inference.engine import Engine, pages_for


def build_engine(
    load: str | Path,
    tokenizer: MultiverseTokenizer,
    config: EngineConfig,
    *,
    longest: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Engine:
    """An engine over a checkpoint.

    Args:
        load: checkpoint folder in any format.
        tokenizer: of the model.
        config: sizes and limits.
        longest: tokens of the longest prompt and answer to come, for `num_pages` 0; default: the model's full length.
        dtype: of weights and cache.
        device: where they live.

    Raises:
        CheckpointError, ConfigError: see `load_checkpoint`.
    """
    model, model_config = load_checkpoint(load, dtype=dtype, device=device)
    if not config.num_pages:
        longest = longest or model_config.max_sequence_length
        config = dataclasses.replace(config, num_pages=pages_for(longest, config))
    return Engine(
        model,
        tokenizer.structure_vocab,
        config,
        vocab_size=tokenizer.vocab_size,
        detokenize=tokenizer.detokenize,
    )
