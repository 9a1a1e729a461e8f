"""The model that a run starts from: fresh weights, or those of a checkpoint, with rows for the structure tags."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_multiverse.checkpoints.control_tokens import ControlTokenSource, tokenizer_folder
from megatron_multiverse.checkpoints.fresh import FreshSource
from megatron_multiverse.checkpoints.load import model_from_source
from megatron_multiverse.checkpoints.own_tokenizer import differing_id, tokenizer_of
from megatron_multiverse.checkpoints.protocols import Source
from megatron_multiverse.checkpoints.sources import check_source, open_checkpoint
from megatron_multiverse.config import LayerConfig, ModelConfig, TrainConfig, check_sequence_length
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.multiverse_attention import choose_backend
from megatron_multiverse.model.families import preset
from megatron_multiverse.model.gpt import attention_case, build_gpt_model, hide_padded_rows
from megatron_multiverse.model.mcore import ensure_process_group, set_parallel_sizes
from megatron_multiverse.parallel.ranks import Ranks, joined_ranks
from megatron_multiverse.structure import TAGS
from megatron_multiverse.training.deepspeed_settings import check_deepspeed


@contextlib.contextmanager
def joined_groups(config: TrainConfig) -> Iterator[Ranks]:
    """All ranks of the run, divided into the parallel groups of `config.parallel`.

    Raises:
        ConfigError: see `joined_ranks`.
    """
    with joined_ranks(config.parallel.world_size) as ranks:
        if config.runs_on != "one_process":
            parallel = config.parallel
            ensure_process_group()
            set_parallel_sizes(
                parallel.tensor_model_parallel_size,
                parallel.pipeline_model_parallel_size,
                context=parallel.context_parallel_size,
                virtual_pipeline=parallel.virtual_pipeline_model_parallel_size,
            )
        yield ranks


def describe_model(config: TrainConfig, row_setting: str = "data.seq_length") -> ModelConfig:
    """Shape of the model to train: `config.model`, `config.model_preset`, or the saved one's of `config.init_from`.

    Args:
        config: the run.
        row_setting: what the user sets the length of rows with, for the error.

    Raises:
        CheckpointError: `config.init_from` is no checkpoint.
        ConfigError: there is no such preset, the rows of the data are longer than the model allows, the model cannot
            be cut into the parts of `config.parallel`, or DeepSpeed is asked for and cannot run so.
    """
    if config.runs_on == "deepspeed":
        check_deepspeed(config)
    if config.init_from is not None:
        model_config = open_start(config.init_from, config).config
    else:
        model_config = config.model or preset(config.model_preset or "")  # TrainConfig checks that there is one
    check_sequence_length(config.data, model_config, row_setting)
    config.parallel.check_model(model_config)
    return model_config


def open_start(folder: str, config: TrainConfig) -> Source:
    """The checkpoint in `folder`, with rows for the tags that its tokenizer lacks if `config` asks for them.

    Raises:
        CheckpointError: it is no checkpoint, or has no tokenizer.json to which tags could be added.
    """
    source = open_checkpoint(folder)
    if not config.add_control_tokens:
        return source
    return ControlTokenSource(source, tokenizer_folder(source) or config.data.tokenizer_model)


def check_start(config: TrainConfig, tokenizer: MultiverseTokenizer, *, learns_from_answers: bool = False) -> None:
    """Hold the tokenizer of the data against the model that the run starts from.

    Rows of tags that the model's own tokenizer lacks were never trained; often there are spare rows at these ids, so
    that nothing else would notice.

    Args:
        config: the run.
        tokenizer: the one that is used.
        learns_from_answers: it is reinforcement learning, whose user has other settings, for the error.

    Raises:
        ConfigError: the ids mean other text in the model's tokenizer, or the model has no rows for the tags and
            `add_control_tokens` does not make them.
    """
    if config.init_from is None:
        return
    if learns_from_answers:
        named, remedy = "task.tokenizer_model", "leave that out, so that the one of the model is taken"
        mend = "Train it on Multiverse data first, with pretrain_scripts/sft_multiverse.py and its add_control_tokens"
    else:
        named, remedy = "data.tokenizer_model", "preprocess with the tokenizer of the model"
        mend = "Set add_control_tokens to true, which makes them from the rows of the pieces of their text"
    named = f"{named} ({config.data.tokenizer_model})"
    own = tokenizer_of(open_checkpoint(config.init_from), tokenizer)
    clash = differing_id(own, tokenizer) if own is not None else None
    # One of them may have further tokens: rows that data never names, or that are made for it.
    if own is not None and clash is not None and None not in clash:
        number, theirs, ours = clash
        raise ConfigError(
            f"token {number} is {theirs!r} in the tokenizer of init_from ({own.path}), but {ours!r} in {named}: "
            f"{remedy}"
        )
    lacking = own or tokenizer
    if lacking.added_tags and not config.add_control_tokens:
        where = f"init_from ({own.path})" if own else named
        raise ConfigError(
            f"the tokenizer of {where} lacks {len(lacking.added_tags)} of {len(TAGS)} structure tags, "
            f"{lacking.added_tags[0]} for one: their rows in the model were never trained. {mend}, or name a model "
            "whose tokenizer has the tags"
        )


def create_model(config: TrainConfig, model_config: ModelConfig, device: torch.device) -> tuple[nn.Module, LayerConfig]:
    """A model with fresh weights, or with those that `config.init_from` names.

    Returns:
        The model, and `config.layers` with every "auto" replaced by what runs.

    Raises:
        ConfigError: what `config.layers` asks for cannot run on `device`.
    """
    dtype, compute_dtype = dtypes(config)
    layers = chosen_layers(config, model_config, device, compute_dtype)
    if config.init_from is not None:
        source = open_start(config.init_from, config)
        check_source(source)
        model, _ = model_from_source(source, dtype=dtype, device=device, layers=layers, compute_dtype=compute_dtype)
    else:
        model = build_gpt_model(
            model_config, dtype=dtype, device=device, seed=config.seed, layers=layers, compute_dtype=compute_dtype
        )
    return model, dataclasses.replace(layers, transformer_impl=model.config.transformer_impl)


def create_chunks(
    config: TrainConfig,
    model_config: ModelConfig,
    device: torch.device,
    write: Callable[[nn.Parameter, Tensor], None] | None = None,
) -> tuple[list[nn.Module], LayerConfig]:
    """This rank's part of a model: one chunk of layers, or several with an interleaved pipeline.

    Fresh weights are the same however the model is cut. They are drawn on the device, so a GPU has others than a CPU,
    and they are not those of `create_model` from the same seed.

    Args:
        config: the run.
        model_config: shape of the model.
        device: where it goes.
        write: puts a value into a parameter; see `model_from_source`.

    Returns:
        The chunks, and `config.layers` with every "auto" replaced by what runs.

    Raises:
        ConfigError: what `config.layers` asks for cannot run on `device`.
    """
    dtype = weights_dtype(config)
    layers, parallel = chosen_layers(config, model_config, device, dtype), config.parallel
    source: Source = FreshSource(model_config, config.seed, device)
    if config.init_from is not None:
        source = open_start(config.init_from, config)
        check_source(source)
    virtual = parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for number in range(virtual):
        options: dict[str, Any] = {"layers": layers, "sequence_parallel": parallel.sequence_parallel}
        if write is not None:
            options["write"] = write
        stage = number if virtual > 1 else None
        chunk, padded = model_from_source(source, dtype=dtype, device=device, vp_stage=stage, **options)
        if padded.vocab_size > model_config.vocab_size:
            hide_padded_rows(chunk, model_config.vocab_size)
        chunks.append(chunk)
    return chunks, dataclasses.replace(layers, transformer_impl=chunks[0].config.transformer_impl)


def chosen_layers(
    config: TrainConfig, model_config: ModelConfig, device: torch.device, compute_dtype: torch.dtype
) -> LayerConfig:
    """`config.layers` with the attention backend that runs, and the chunks of the loss: the one place where a run
    chooses them. From here on they are passed along and recorded."""
    parallel = config.parallel
    case = attention_case(
        model_config,
        device,
        compute_dtype,
        deterministic=config.deterministic,
        placed=parallel.context_parallel_size > 1 and parallel.cp_comm_type == "all_gather",
    )
    backend: Any = choose_backend(config.layers.attention_backend, case)
    return dataclasses.replace(config.layers, attention_backend=backend, loss_chunk_tokens=config.loss_chunk_tokens)


def dtypes(config: TrainConfig) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the weights, dtype of the matrix products)."""
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    return dtype, torch.bfloat16 if config.dtype == "bf16" else dtype


def weights_dtype(config: TrainConfig) -> torch.dtype:
    """dtype of the weights with the engine of the run: with bf16 the engine one_process keeps float32 ones."""
    if config.runs_on == "one_process":
        return dtypes(config)[0]
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32
