"""An engine from a checkpoint: what tools, the server, evaluation and rollouts start from."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_multiverse.checkpoints.load import load_checkpoint, model_from_source
from megatron_multiverse.checkpoints.own_tokenizer import differing_id, tokenizer_of
from megatron_multiverse.checkpoints.protocols import Source
from megatron_multiverse.checkpoints.sources import check_source, open_checkpoint
from megatron_multiverse.config import EngineConfig, ModelConfig
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer, MultiverseTokenizer
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.step.forward import KVStore
from megatron_multiverse.inference.step.model_ranks import ModelRanks
from megatron_multiverse.inference.step.quantize import quantize_products
from megatron_multiverse.inference.step.runner import Runner
from megatron_multiverse.inference.text.guide import Grammars
from megatron_multiverse.model.mcore import set_parallel_sizes
from megatron_multiverse.parallel.ranks import Ranks, joined_ranks

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.85
"""Of the memory that a model and the activations of the largest step leave free. The rest is for workspaces and CUDA
graphs."""


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
        config: sizes and limits. `num_pages` 0 takes enough for eight of the longest answers, or as many as fit on the
            GPU beside the model.
        longest: tokens of the longest prompt and answer to come, for `num_pages` 0; default: the model's full length.
        dtype: of weights and cache.
        device: where they live.

    Raises:
        CheckpointError, ConfigError: see `load_checkpoint`; also for a tokenizer that is not the model's, and for a
            GPU that the model fills.
    """
    source = open_checkpoint(load)
    _check_tokenizer(source, tokenizer)
    check_source(source)
    model, model_config = model_from_source(source, dtype=dtype, device=device)
    if config.quantization != "none":  # before the cache is measured, which gets what the weights give free
        quantize_products(model, ModelRanks.current())
    if not config.num_pages:
        longest = longest or model_config.max_sequence_length
        page_bytes, free = KVStore.page_bytes(model, config.page_size), free_bytes(torch.device(device))
        if free is not None:
            free -= min(step_bytes(model_config, config.max_step_tokens, dtype), free // 2)
        num_pages = fitting_pages(config.pages_for(longest), page_bytes, free)
        config = dataclasses.replace(config, num_pages=num_pages)
    return Engine(
        model,
        tokenizer.structure_vocab,
        config,
        vocab_size=tokenizer.vocab_size,
        detokenize=tokenizer.detokenize,
        grammars=grammars_of(tokenizer),
    )


def grammars_of(tokenizer: MultiverseTokenizer) -> Grammars | None:
    """What compiles grammars for a tokenizer; None where that is not Hugging Face's: llguidance reads no other."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    return Grammars(tokenizer.to_json(), tokenizer.structure_vocab, tokenizer.vocab_size)


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that nothing uses; None on a CPU, where the cache takes memory as it is written."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # what reading the checkpoint has left
    return torch.cuda.mem_get_info(device)[0]


def step_bytes(shape: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """About what the activations of a step of so many tokens take on one rank; tensor parallel ranks take less.
    Measured in benchmarks/results/engine_chunks_h200.json."""
    qkv = (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.kv_channels
    return tokens * (3 * shape.ffn_hidden_size + 8 * shape.hidden_size + 2 * qkv) * dtype.itemsize


def fitting_pages(wanted: int, page_bytes: int, free: int | None) -> int:
    """Pages of the cache: as many as wanted, or as fit into `CACHE_SHARE` of the free bytes.

    Args:
        wanted: pages that would be taken if there were room.
        page_bytes: bytes of a page on this rank.
        free: bytes that nothing uses; None takes all that is wanted.

    Raises:
        ConfigError: not one page fits.
    """
    fitting = wanted if free is None else int(CACHE_SHARE * free) // page_bytes
    if fitting < 1:
        raise ConfigError(
            f"the model leaves {(free or 0) / 2**20:.0f} MiB of the GPU free, too little for one page of the cache "
            f"({page_bytes / 2**20:.1f} MiB): spread it over more GPUs, or load it as bf16 or with quantization fp8"
        )
    if fitting < wanted:
        logger.info(
            "cache of %d pages, %.1f GiB: what the model leaves free. Eight of the longest answers would take %.1f GiB",
            fitting,
            fitting * page_bytes / 2**30,
            wanted * page_bytes / 2**30,
        )
    return min(fitting, wanted)


def _check_tokenizer(source: Source, tokenizer: MultiverseTokenizer) -> None:
    own = tokenizer_of(source, tokenizer)
    if own is not None and (differing := differing_id(own, tokenizer)) is not None:
        raise ConfigError(
            f"the tokenizer of {tokenizer.path} gives id {differing[0]} another text than the one in {own.path}: leave "
            "--tokenizer-model out, or name the tokenizer that the model was trained with"
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
