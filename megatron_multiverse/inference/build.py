"""An engine from a checkpoint: what tools, the server, evaluation and rollouts start from."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config.engine import EngineConfig
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.step.runner import Runner
from megatron_multiverse.model.mcore import set_parallel_sizes
from megatron_multiverse.parallel.ranks import Ranks, joined_ranks


def build_engine(
    load: str | Path,
    tokenizer: MultiverseTokenizer,
    config: EngineConfig,
    *,
    longest: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Engine:
    """An engine over a checkpoint; under tensor and pipeline parallelism on the first rank, see `engine_ranks`.

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
        config = dataclasses.replace(config, num_pages=config.pages_for(longest))
    return Engine(
        model,
        tokenizer.structure_vocab,
        config,
        vocab_size=tokenizer.vocab_size,
        detokenize=tokenizer.detokenize,
    )


def follow_engine(load: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
    """What all ranks but the first do while that one has the engine that `build_engine` made of the same checkpoint.

    Returns when `Engine.close` is called there.
    """
    model, _ = load_checkpoint(load, dtype=dtype, device=device)
    Runner(model, num_pages=0, page_size=0).follow()


@contextlib.contextmanager
def engine_ranks(tensor: int, pipeline: int, *, rendezvous_url: str = "env://") -> Iterator[Ranks]:
    """The ranks of one engine, as torchrun, or the server, started them.

    Args:
        tensor: tensor parallel ranks: each holds a part of every layer.
        pipeline: pipeline stages: each holds some of the layers.
        rendezvous_url: where they meet, see `joined_ranks`.

    Raises:
        ConfigError: another number of ranks was started.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != tensor * pipeline:
        raise ConfigError(
            f"{tensor} tensor parallel ranks x {pipeline} pipeline stages are {tensor * pipeline} processes, "
            f"{started} were started: use torchrun --nproc-per-node {tensor * pipeline}, or change the sizes"
        )
    with joined_ranks(started, rendezvous_url=rendezvous_url) as ranks:
        if started > 1:
            set_parallel_sizes(tensor, pipeline)
        yield ranks
