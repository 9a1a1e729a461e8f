"""What a training run needs on each GPU, worked out without one: `--dry-run` of the scripts in pretrain_scripts/.

The parts of the model are really built, for one rank of every pipeline stage, but on torch's meta device, which has
shapes and no memory; so whatever would refuse to be cut refuses here. What follows from the weights is exact.
Activations are counted by what the layers keep for the backward pass; buffers of NCCL, workspaces and fragmentation are
not counted: leave about 5 GiB for them. Measured peaks of PyTorch's allocator were at most 1.5 GiB above the estimate
(tests/unit/training/test_memory.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed

from megatron_multiverse.config import LayerConfig, ModelConfig, ParallelConfig, TrainConfig, pad_vocab_size
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.mcore import set_parallel_sizes
from megatron_multiverse.training.deepspeed_settings import deepspeed_config
from megatron_multiverse.training.start import dtypes, weights_dtype

GIB = 2**30
NOT_COUNTED_GIB = 5.0
"""Room for buffers of NCCL, workspaces and fragmentation."""
CARDS = {"80 GB": 79.0, "141 GB": 139.0}
"""What the dry run looks at: sold memory -> GiB that PyTorch sees of it."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage."""

    parameters: int
    """Of this rank, not bytes."""
    layers: int
    """Transformer layers of this rank."""
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """Weights of other ranks that ZeRO 3 holds for the moment, and its bucket of gradients."""
    activations: int
    logits: int
    host: int
    """In the host's memory; not part of the total."""
    beside: int = 0
    """What else the run has, see `Beside`."""
    between: int = 0
    """The part of it that is there only while activations and logits are not."""

    @property
    def total(self) -> int:
        """All of it on the GPU, when that is most."""
        state = self.weights + self.gradients + self.optimizer + self.gathered + self.beside
        return state + max(self.activations + self.logits, self.between)


@dataclass(frozen=True)
class Part:
    """Something else that a run has on each GPU."""

    name: str
    """As a line of the report."""
    sizes: list[tuple[int, int]]
    """(elements, bytes of each)."""
    is_between: bool = False
    """Whether it is there only while activations and logits are not."""

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(count * size for count, size in self.sizes)

    def told(self) -> str:
        """Its arithmetic."""
        return terms(self.sizes) + (", given back for the updates" if self.is_between else "")


@dataclass(frozen=True)
class Beside:
    """What a run of another kind than supervised training has on each GPU."""

    logits: list[tuple[int, int]]
    """What its output layer holds, in place of `logits_of`."""
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class StateBytes:
    """How much a parameter takes: (bytes, ranks that share them)."""

    weights: tuple[int, int]
    gradients: tuple[int, int]
    optimizer: tuple[int, int]
    host: tuple[int, int] = (0, 1)


def estimate(config: TrainConfig, model: ModelConfig, beside: Beside | None = None) -> list[StageMemory]:
    """What the ranks of each pipeline stage need.

    Args:
        config: the run; its number of ranks is WORLD_SIZE.
        model: shape of the model.
        beside: what it has that supervised training has not.

    Raises:
        ConfigError: the model cannot be cut into the parts of `config.parallel`, or the user's DeepSpeed JSON
            contradicts `config`.
    """
    config.parallel.check_model(model)
    stages = config.parallel.pipeline_model_parallel_size
    return [_stage(config, model, stage, beside) for stage in range(stages)]


def least_recompute(
    config: TrainConfig, model: ModelConfig, gib: float, beside: Beside | None = None
) -> LayerConfig | None:
    """`config.layers` with the fewest recomputed layers that the estimate lets fit, or None if none do.

    Whole layers are recomputed, the first ones of each chunk (recompute_method block): for each GiB that this saves it
    costs less time than recomputing the MLPs of all layers, whose products are seven eighths of a layer's.

    Args:
        config: the run; its own recompute does not count.
        model: shape of the model.
        gib: memory of a GPU; `NOT_COUNTED_GIB` of it are left free.
        beside: see `estimate`.
    """
    modules = LayerConfig().recompute_modules
    for number in range(chunk_layers(config, model) + 1):
        how = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": number}
        if number == 0:
            how = {"recompute_granularity": None, "recompute_method": "uniform", "recompute_num_layers": 1}
        layers = dataclasses.replace(config.layers, recompute_modules=modules, **how)  # type: ignore[arg-type]
        stages = estimate(dataclasses.replace(config, layers=layers), model, beside)
        if max(stage.total for stage in stages) <= (gib - NOT_COUNTED_GIB) * GIB:
            return layers
    return None


def _stage(config: TrainConfig, model: ModelConfig, stage: int, beside: Beside | None) -> StageMemory:
    parallel = config.parallel
    parameters, layers = _parameters(parallel, parallel.world_size, model, stage)
    state = state_bytes(config)
    weights, gradients, optimizer, host = (
        parameters * size // ranks for size, ranks in (state.weights, state.gradients, state.optimizer, state.host)
    )
    is_last = stage == parallel.pipeline_model_parallel_size - 1
    logits, parts = (beside.logits, beside.parts) if beside is not None else (logits_of(config, model), ())
    return StageMemory(
        parameters=parameters,
        layers=layers,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        gathered=sum(count * size for count, size in gathered(config, parameters)),
        activations=tokens_of(config) * kept_per_token(config, model) * layers_in_flight(config, layers, stage),
        logits=sum(count * size for count, size in logits) if is_last else 0,
        host=host,
        beside=sum(part.size for part in parts if not part.is_between),
        between=sum(part.size for part in parts if part.is_between),
    )


def state_bytes(config: TrainConfig) -> StateBytes:
    """What weights, gradients and optimizer take for each parameter. AdamW has two float32 moments; beside bf16 weights
    there are float32 ones, which DeepSpeed keeps also beside float32 weights. The engine one_process has no bf16
    weights: autocast makes copies of them for a forward and backward pass."""
    parallel, zero = config.parallel, config.deepspeed
    width = weights_dtype(config).itemsize
    if config.runs_on == "one_process":
        return StateBytes((width + (2 if config.dtype == "bf16" else 0), 1), (width, 1), (2 * width, 1))
    sharing = parallel.data_parallel_size * parallel.context_parallel_size
    if config.runs_on != "deepspeed":
        return StateBytes((width, 1), (4, 1), (12 if width == 2 else 8, sharing))
    weights = (width, sharing if zero.zero_stage == 3 else 1)
    gradients = (4, sharing if zero.zero_stage >= 2 else 1)
    optimizer, host = (12, sharing), 0
    if zero.offload_optimizer == "cpu":
        host += 12 + (4 if zero.zero_stage >= 2 else 0)
        optimizer, gradients = (0, sharing), (0, sharing) if zero.zero_stage >= 2 else gradients
    if zero.offload_param == "cpu":
        host, weights = host + width, (0, sharing)
    return StateBytes(weights, gradients, optimizer, (host, sharing))


def gathered(config: TrainConfig, parameters: int) -> list[tuple[int, int]]:
    """What ZeRO 3 holds beside its own share, as (elements, bytes of each): weights on the way through the layers, and
    a bucket of gradients on the way to their ranks. DeepSpeed's defaults, unless the user's JSON says otherwise."""
    if config.runs_on != "deepspeed" or config.deepspeed.zero_stage < 3:
        return []
    settings = deepspeed_config(config)["zero_optimization"]
    live = int(settings.get("stage3_max_live_parameters", 1e9))
    bucket = int(settings.get("reduce_bucket_size", 5e8))
    width = weights_dtype(config).itemsize
    return [(min(live, parameters), width), (min(bucket, parameters), 4)]


@contextlib.contextmanager
def pretended_ranks(parallel: ParallelConfig, stage: int) -> Iterator[None]:
    """Process groups of as many ranks as the run has, seen from the first one of a stage; nothing is ever sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world, stages = parallel.world_size, parallel.pipeline_model_parallel_size
    distributed.init_process_group("fake", store=FakeStore(), rank=stage * (world // stages), world_size=world)
    try:
        set_parallel_sizes(
            parallel.tensor_model_parallel_size,
            stages,
            context=parallel.context_parallel_size,
            virtual_pipeline=parallel.virtual_pipeline_model_parallel_size,
        )
        yield
    finally:
        distributed.destroy_process_group()


@functools.cache
def _parameters(parallel: ParallelConfig, world: int, model: ModelConfig, stage: int) -> tuple[int, int]:
    """Parameters and layers of a rank of this stage, all its chunks together. Building takes a second, so what came out
    is remembered; `world` is the number of ranks, which `parallel` reads from the environment."""
    shape = dataclasses.replace(model, vocab_size=pad_vocab_size(model.vocab_size, parallel.tensor_model_parallel_size))
    parameters = layers = 0
    virtual = parallel.virtual_pipeline_model_parallel_size
    with pretended_ranks(parallel, stage), torch.device("meta"):
        for number in range(virtual):
            chunk = build_gpt_model(
                shape,
                device="meta",
                initialize=False,
                # The weights of TransformerEngine's layers, built anywhere. Sequence parallelism changes none of them,
                # but would leave CPU states in megatron-core's tracker of CUDA's generators, which real models share.
                layers=LayerConfig(transformer_impl="local"),
                vp_stage=number if virtual > 1 else None,
            )
            parameters += sum(parameter.numel() for parameter in chunk.parameters())
            layers += len(chunk.decoder.layers)
    return parameters, layers


def chunk_layers(config: TrainConfig, model: ModelConfig) -> int:
    """Transformer layers of each chunk of the model."""
    parallel = config.parallel
    chunks = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    return model.num_layers // chunks


def tokens_of(config: TrainConfig) -> int:
    """Tokens of a microbatch on each rank."""
    return config.data.micro_batch_size * config.data.seq_length // config.parallel.context_parallel_size


def kept_per_token(config: TrainConfig, model: ModelConfig) -> int:
    """Bytes that a layer keeps of each token for the backward pass (TransformerEngine's layers), the mean of a chunk.

    h: width of the residual stream, q and kv: of all query and key heads, f: of the MLP, t: tensor parallel ranks.
    Input and output of both norms: 4 h, shared by the ranks with sequence parallelism. Queries, keys, values and the
    output of attention: (2 q + 2 kv) / t. Gate and up projection and their product: 3 f / t. Full recompute keeps the
    input alone (method block: of the first layers of a chunk), selective recompute of the MLP leaves out its part.
    """
    parallel, layers = config.parallel, config.layers
    width = dtypes(config)[1].itemsize
    tp = parallel.tensor_model_parallel_size
    shared = tp if parallel.sequence_parallel else 1
    queries, keys = (n * model.kv_channels for n in (model.num_attention_heads, model.num_query_groups))
    # The residual stream has the format of the weights, and so has the input of both norms: in one process more than
    # their output has with bf16.
    wide = weights_dtype(config).itemsize // width
    kept = (2 * wide + 2) * model.hidden_size // shared + (2 * queries + 2 * keys) // tp
    if not layers.recomputes("mlp"):
        kept += 3 * model.ffn_hidden_size // tp
    if layers.recompute_granularity == "full":
        every, is_block = chunk_layers(config, model), layers.recompute_method == "block"
        recomputed = min(every, layers.recompute_num_layers) if is_block else every
        kept = (recomputed * (wide * model.hidden_size // shared) + (every - recomputed) * kept) // every
    return width * kept


def logits_of(config: TrainConfig, model: ModelConfig) -> list[tuple[int, int]]:
    """What the output layer holds at its peak, as (elements, bytes of each).

    First the logits of all tokens, or of a chunk, and their gradient, which TransformerEngine's cross entropy leaves in
    a copy of them. (megatron-core's own, which local layers take: their float32 softmax, and beside it first
    themselves, then their gradient.) With chunks also the float32 gradient of the output layer beside what a chunk adds
    to it, and the gradient of all hidden states.
    """
    parallel = config.parallel
    tp, width = parallel.tensor_model_parallel_size, dtypes(config)[1].itemsize
    rows, tokens = pad_vocab_size(model.vocab_size, tp) // tp, tokens_of(config)
    of_logit = width + (4 if config.layers.transformer_impl == "local" else width)
    chunk = config.loss_chunk_tokens
    if not chunk:
        return [(tokens * rows, of_logit)]
    hidden = model.hidden_size
    return [(min(tokens, chunk) * rows, of_logit), (rows * hidden, 4 + width), (tokens * hidden, width)]


def layers_in_flight(config: TrainConfig, layers: int, stage: int) -> int:
    """Layers times microbatches whose activations a stage holds at the same time: 1F1B, or interleaved."""
    parallel = config.parallel
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if virtual == 1:
        return layers * min(config.num_microbatches, stages - stage)
    chunks = 2 * (stages - stage - 1) + (virtual - 1) * stages + 1
    return layers // virtual * min(config.num_microbatches * virtual, chunks)


def terms(sizes: list[tuple[int, int]]) -> str:
    """(elements, bytes of each) in words."""
    return " + ".join(f"{count / 1e9:.4g} billion x {size} bytes" for count, size in sizes)
