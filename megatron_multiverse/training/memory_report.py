"""What a dry run prints: the estimate of `memory.py` as text, with its arithmetic and the settings that fit."""

from __future__ import annotations

from megatron_multiverse.config import ModelConfig, TrainConfig, check_sequence_length
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.model.families import preset
from megatron_multiverse.training.memory import (
    CARDS,
    GIB,
    NOT_COUNTED_GIB,
    Beside,
    chunk_layers,
    estimate,
    gathered,
    kept_per_token,
    layers_in_flight,
    least_recompute,
    logits_of,
    state_bytes,
    terms,
    tokens_of,
)
from megatron_multiverse.training.start import describe_model


def shape_to_try(config: TrainConfig, published: str | None, row_setting: str = "data.seq_length") -> ModelConfig:
    """Shape of the model of a dry run.

    Args:
        config: the run.
        published: name of a published shape, for a checkpoint that is not at hand; None looks at what the run has.
        row_setting: what the user sets the length of rows with, for the error.

    Raises:
        CheckpointError, ConfigError: see `describe_model`; there is no such published shape.
    """
    if published is not None:
        model = preset(published)
        check_sequence_length(config.data, model, row_setting)
        return model
    try:
        return describe_model(config, row_setting)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or name its published shape, as in --dry-run-shape qwen2.5-7b") from error


def report(config: TrainConfig, model: ModelConfig) -> str:
    """The estimate of a run of supervised training as text, with its arithmetic."""
    parallel = config.parallel
    first = (
        f"{counted(model.num_parameters)} parameters on {parallel.world_size} ranks: "
        f"tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x "
        f"context {parallel.context_parallel_size} x data {parallel.data_parallel_size}; "
        f"{config.num_microbatches} microbatches of {config.data.micro_batch_size} x {config.data.seq_length} tokens"
    )
    return "\n".join([first, *memory_lines(config, model)])


def memory_lines(config: TrainConfig, model: ModelConfig, beside: Beside | None = None) -> list[str]:
    """The estimate as lines, with its arithmetic. Layers of activations count once for each microbatch in flight.

    Args:
        config: the run.
        model: its shape.
        beside: what it has that supervised training has not.
    """
    tokens, kept, state = tokens_of(config), kept_per_token(config, model), state_bytes(config)
    logits = beside.logits if beside is not None else logits_of(config, model)
    lines = []
    for stage, memory in enumerate(estimate(config, model, beside)):
        in_flight = layers_in_flight(config, memory.layers, stage)
        lines += [
            f"stage {stage}: {memory.layers} layers, {counted(memory.parameters, 3)} parameters on each rank",
            f"  weights      {_gib(memory.weights)} = parameters x {_shared(state.weights)}",
            f"  gradients    {_gib(memory.gradients)} = parameters x {_shared(state.gradients)}",
            f"  optimizer    {_gib(memory.optimizer)} = parameters x {_shared(state.optimizer)}",
        ]
        if memory.gathered:
            lines.append(f"  gathered     {_gib(memory.gathered)} = {terms(gathered(config, memory.parameters))}")
        lines += [
            f"  activations  {_gib(memory.activations)} = {tokens} tokens x {kept} bytes x {in_flight} layers",
        ]
        if memory.logits:
            lines.append(f"  logits       {_gib(memory.logits)} = {terms(logits)}")
        lines += [f"  {part.name:<12} {_gib(part.size)} = {part.told()}" for part in (beside.parts if beside else ())]
        lines.append(f"  together     {_gib(memory.total)}")
        if memory.host:
            lines.append(f"  on the host  {_gib(memory.host)} = parameters x {_shared(state.host)}, for each GPU")
    lines.append(
        f"not counted: buffers of NCCL, workspaces, fragmentation; leave about {NOT_COUNTED_GIB:g} GiB for them"
    )
    return lines + advice_lines(config, model, beside)


def advice_lines(config: TrainConfig, model: ModelConfig, beside: Beside | None = None) -> list[str]:
    """For each card of `CARDS`, with what recompute the run fits; see `memory_lines`."""
    return [f"on GPUs of {card}: {_advice(config, model, gib, beside)}" for card, gib in CARDS.items()]


def _advice(config: TrainConfig, model: ModelConfig, gib: float, beside: Beside | None) -> str:
    """The least recompute with which a run fits, as settings."""
    layers = least_recompute(config, model, gib, beside)
    if layers is None:
        return "does not fit, however much is recomputed"
    if layers.recompute_granularity is None:
        return "fits without recompute"
    return (
        f"fits with the first {layers.recompute_num_layers} of {chunk_layers(config, model)} layers recomputed: "
        "layers.recompute_granularity full, recompute_method block, "
        f"recompute_num_layers {layers.recompute_num_layers}"
    )


def counted(parameters: int, digits: int = 2) -> str:
    """A number of parameters in words: 7.62 billion; 3.6 million or 18,432, where billions would be 0.00."""
    if parameters < 10**5:
        return f"{parameters:,}"
    if parameters < 10**8:
        return f"{parameters / 1e6:.1f} million"
    return f"{parameters / 1e9:.{digits}f} billion"


def _shared(state: tuple[int, int]) -> str:
    size, ranks = state
    if not size:
        return "0 bytes, it is on the host"
    return f"{size} bytes" + (f" / {ranks} ranks" if ranks > 1 else "")


def _gib(size: int) -> str:
    return f"{size / GIB:7.2f} GiB"
