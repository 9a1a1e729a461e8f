"""Building the model: the only module that constructs megatron-core's GPTModel (its end is announced)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_multiverse.config import LayerConfig, ModelConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.multiverse_attention import AttentionCase, check_backend
from megatron_multiverse.model.chunked_loss import ChunkedLossGPT
from megatron_multiverse.model.cpu import cuda_is_cpu, device_neutral_cuda
from megatron_multiverse.model.layer_specs import choose_transformer_impl, get_final_norm, get_gpt_layer_spec
from megatron_multiverse.model.layers import PositionIdRotary, install_rotary
from megatron_multiverse.model.mcore import ensure_cuda_rng_states, ensure_parallel_state


def transformer_config(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    initialize: bool = True,
    layers: LayerConfig | None = None,
    transformer_impl: str = "local",
    sequence_parallel: bool = False,
    on_device: bool = False,
) -> TransformerConfig:
    """megatron-core's config for ours: RMSNorm, SwiGLU, no dropout, no fusion that bypasses our parts.

    The parallel sizes are those of megatron-core's process groups.

    Raises:
        ConfigError: uniform recompute in chunks that do not divide the layers of this pipeline stage, or FP8 with
            widths per rank that its products do not take.
    """
    ensure_parallel_state()
    layers = layers or LayerConfig()
    if layers.fp8:
        _check_fp8_widths(config, parallel_state.get_tensor_model_parallel_world_size())
    full = layers.recompute_granularity == "full"
    mcore_config = TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        layernorm_epsilon=config.layernorm_epsilon,
        add_qkv_bias=config.add_qkv_bias,
        qk_layernorm=config.qk_layernorm,
        add_bias_linear=config.add_bias_linear,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=not on_device,  # the same weights from the same seed on every device
        perform_initialization=initialize,
        cuda_graph_scope=[],  # the default string warns
        transformer_impl=transformer_impl,
        bias_activation_fusion=transformer_impl == "transformer_engine",
        # megatron-core's own cross entropy goes over float32 copies of the logits nine times.
        cross_entropy_loss_fusion=transformer_impl == "transformer_engine",
        cross_entropy_fusion_impl="te",
        fp8=layers.fp8,
        fp8_recipe=layers.fp8_recipe,
        # Otherwise the FP8 weights of the first microbatch stay in use until TransformerEngine is told of new ones.
        disable_parameter_transpose_cache=True,
        recompute_granularity=layers.recompute_granularity,
        recompute_method=layers.recompute_method if full else None,
        recompute_num_layers=layers.recompute_num_layers if full else None,
        recompute_modules=list(layers.recompute_modules),
    )
    if full and layers.recompute_method == "uniform":
        _check_recompute_chunks(layers.recompute_num_layers, get_num_layers_to_build(mcore_config))
    return mcore_config


def attention_case(
    config: ModelConfig,
    device: torch.device,
    compute_dtype: torch.dtype,
    *,
    deterministic: bool = False,
    placed: bool = False,
) -> AttentionCase:
    """What a model asks of its attention backend: its head width, on a device, with matrix products of a dtype."""
    return AttentionCase(device.type, compute_dtype, config.kv_channels, deterministic=deterministic, placed=placed)


def _check_fp8_widths(config: ModelConfig, tp: int) -> None:
    """Rows and columns of every matrix of the four linear layers must be multiples of 16 on each of `tp` ranks."""
    heads, groups = config.num_attention_heads, config.num_query_groups
    widths = {
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size / tp,
        "(num_attention_heads + 2 num_query_groups) kv_channels": (heads + 2 * groups) * config.kv_channels / tp,
        "num_attention_heads kv_channels": heads * config.kv_channels / tp,
    }
    if misfits := [f"{name} = {width:g}" for name, width in widths.items() if width % 16]:
        raise ConfigError(
            f"layers.fp8 needs multiples of 16 for the widths of the linear layers on each of {tp} tensor parallel "
            f"ranks, got {', '.join(misfits)}: leave layers.fp8 unset for this model"
        )


def _check_recompute_chunks(chunk: int, num_layers: int) -> None:
    """Chunks of uniform recompute must divide the layers: megatron-core's last chunk would run past the last layer."""
    if num_layers % chunk:
        allowed = ", ".join(str(n) for n in range(1, num_layers + 1) if num_layers % n == 0)
        raise ConfigError(
            f"layers.recompute_num_layers {chunk} does not divide the {num_layers} layers of this pipeline stage, "
            f"which recompute_method uniform asks for; allowed: {allowed}; or set recompute_method to block"
        )


def build_gpt_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    initialize: bool = True,
    layers: LayerConfig | None = None,
    compute_dtype: torch.dtype | None = None,
    sequence_parallel: bool = False,
    vp_stage: int | None = None,
    on_device: bool = False,
) -> ChunkedLossGPT:
    """Build a model with fresh weights, or this rank's part of it under tensor and pipeline parallelism.

    Call it as `model(input_ids, position_ids, None, packed_seq_params=LayoutParams.from_labels(r))` -> logits
    [b, s, vocab]; with `labels=...` it returns the loss of each token [b, s] instead, and with `loss_mask=...` [b, s]
    beside them the loss summed over the tokens of the mask.

    Args:
        config: shape of the model.
        dtype: dtype of the weights; with float64 all but the loss (megatron-core: float32) is float64.
        device: where the weights go.
        seed: seed of the initial weights; torch's global generator is left as it was.
        initialize: False skips the random initialisation (weights are about to be loaded).
        layers: layer spec, FP8, recompute, chunks of the loss; default: TransformerEngine where it runs, no FP8, no
            recompute. Its attention_backend is only checked here: the LayoutParams of each pass name the one that runs.
        compute_dtype: dtype of the matrix products if autocast makes it another than `dtype`.
        sequence_parallel: split norms and residuals by tokens over the tensor parallel ranks.
        vp_stage: which chunk of this pipeline stage, if it has several (interleaved schedule).
        on_device: make the weights on `device` in the first place. Otherwise they lie in host memory and are copied,
            which takes seconds for each billion of them. Only without random initialisation, which is the host's.

    Returns:
        The model in training mode, on `device`.

    Raises:
        ConfigError: what `layers` asks for cannot run on `device`.
    """
    assert not (on_device and initialize), "initial weights are drawn on the host"
    layers, device = layers or LayerConfig(), torch.device(device)
    if layers.attention_backend != "auto":
        check_backend(layers.attention_backend, attention_case(config, device, compute_dtype or dtype))
    impl = choose_transformer_impl(layers, device, compute_dtype or dtype)
    mcore_config = transformer_config(
        config,
        dtype,
        initialize=initialize,
        layers=layers,
        transformer_impl=impl,
        sequence_parallel=sequence_parallel,
        on_device=on_device,
    )
    spec = get_gpt_layer_spec(impl, qk_layernorm=config.qk_layernorm)
    block = TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(mcore_config, vp_stage=vp_stage), layer_norm=get_final_norm(impl)
    )
    if impl == "transformer_engine" or sequence_parallel:
        with cuda_is_cpu(device):
            ensure_cuda_rng_states()
    # Not cuda_is_cpu: weights are drawn on the CPU, whatever `device` is; with on_device they are made where it is.
    with torch.random.fork_rng(devices=[]), device_neutral_cuda(device if on_device else None):
        torch.manual_seed(seed)
        model = ChunkedLossGPT(
            mcore_config,
            block,
            vocab_size=config.vocab_size,
            max_sequence_length=config.max_sequence_length,
            position_embedding_type="none",  # the rotation is ours: layers.py
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
    model.chunk_tokens = layers.chunk_tokens
    angles = torch.float64 if dtype == torch.float64 else torch.float32
    install_rotary(model, PositionIdRotary(config.kv_channels, config.rotary_base, angles, config.rope_scaling))
    placed: ChunkedLossGPT = model.to(device)
    return placed


def hide_padded_rows(model: ChunkedLossGPT, vocab_size: int) -> None:
    """Let the rows that pad a vocabulary for tensor parallelism take no part in the loss: their logits become -inf.

    Args:
        model: this rank's part.
        vocab_size: rows without padding.
    """
    if not model.post_process:
        return
    rank, rows = parallel_state.get_tensor_model_parallel_rank(), model.output_layer.output_size_per_partition
    first = model.first_padded_row = max(0, vocab_size - rank * rows)

    def hide(module: torch.nn.Module, args: object, output: tuple[torch.Tensor, object]) -> None:
        output[0][..., first:] = -torch.inf  # logits [s, b, rows of this rank]

    model.output_layer.register_forward_hook(hide)


def first_layer_of(model: ChunkedLossGPT) -> int:
    """Number of layers on the pipeline stages before this rank's part of the model, as megatron-core divides them."""
    return int(get_transformer_layer_offset(model.config, vp_stage=model.vp_stage))
