"""The two layer specs, local and TransformerEngine, and the one place that chooses between them.

Both have our self-attention, core attention and residual. The local spec runs everywhere, with our RMSNorm; in
TransformerEngine's each norm is fused into the linear layer that follows it, which can compute in FP8.
The choice and its reason are logged once per process.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging

import torch
from megatron.core.extensions import transformer_engine as mcore_te
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_multiverse.config import LayerConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.model.layers import CoreAttention, RMSNorm, SelfAttention, residual_add

logger = logging.getLogger(__name__)


def get_gpt_layer_spec(transformer_impl: str, *, qk_layernorm: bool = False) -> ModuleSpec:
    """megatron-core's transformer layer with our parts.

    Args:
        transformer_impl: "local" or "transformer_engine", see `choose_transformer_impl`.
        qk_layernorm: RMSNorm on each query and key head (Qwen3).

    Raises:
        ConfigError: any other transformer_impl.
    """
    _check_impl(transformer_impl)
    if transformer_impl == "transformer_engine":
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
        attention = spec.submodules.self_attention.submodules
    else:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_layernorm)
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
        attention = spec.submodules.self_attention.submodules
        if qk_layernorm:
            attention.q_layernorm = RMSNorm
            attention.k_layernorm = RMSNorm
    spec.submodules.self_attention.module = SelfAttention
    attention.core_attention = CoreAttention
    spec.submodules.self_attn_bda = residual_add
    spec.submodules.mlp_bda = residual_add
    return spec


def get_final_norm(transformer_impl: str) -> type:
    """The norm after the last layer. Raises ConfigError as `get_gpt_layer_spec` does."""
    _check_impl(transformer_impl)
    return mcore_te.TENorm if transformer_impl == "transformer_engine" else RMSNorm


def _check_impl(transformer_impl: str) -> None:
    if transformer_impl not in ("local", "transformer_engine"):
        raise ConfigError(
            f"transformer_impl is {transformer_impl!r}, allowed: local, transformer_engine (choose_transformer_impl "
            "turns auto into one of them)"
        )


def choose_transformer_impl(layers: LayerConfig, device: torch.device, compute_dtype: torch.dtype) -> str:
    """ "local" or "transformer_engine" for a model on `device` whose matrix products are in `compute_dtype`.

    Raises:
        ConfigError: what was asked for cannot run here; the message says why and what to do.
    """
    impl, reason = str(layers.transformer_impl), "asked for"
    if impl == "auto":
        impl, reason = ("transformer_engine", "FP8 needs it") if layers.fp8 else _auto(device, compute_dtype)
    if impl == "transformer_engine":
        _check_transformer_engine(layers, device, compute_dtype)
    if layers.fp8 and (problem := _fp8_problem(layers.fp8_recipe, compute_dtype)):
        raise ConfigError(f"layers.fp8 {layers.fp8!r} cannot run here: {problem}")
    if layers.recompute_granularity and device.type != "cuda":
        raise ConfigError(
            f"layers.recompute_granularity {layers.recompute_granularity!r} needs a CUDA device (megatron-core "
            f"restores CUDA's random state), got {device.type}: leave it unset"
        )
    _check_recompute_of_norms(layers, impl)
    if device.type != "meta":  # shapes alone, of layers that compute nothing
        _log_once(impl, reason)
    return impl


def _check_transformer_engine(layers: LayerConfig, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Raise ConfigError if TransformerEngine cannot run, or would ignore what was asked for."""
    settings = ["transformer_impl"] * (layers.transformer_impl != "auto") + ["fp8"] * (layers.fp8 is not None)
    asked = " and ".join(f"layers.{name} {getattr(layers, name)!r}" for name in settings)
    if problem := transformer_engine_problem(device):
        unset = " and ".join(f"layers.{name}" for name in settings)
        raise ConfigError(f"{asked} cannot run here: {problem}. Mend that, or leave {unset} unset")
    if compute_dtype == torch.float64:
        raise ConfigError(f"{asked} cannot run: TransformerEngine has no float64, set dtype to bf16 or float32")


def _check_recompute_of_norms(layers: LayerConfig, impl: str) -> None:
    if impl == "transformer_engine" and layers.recomputes("layernorm"):
        raise ConfigError(
            "layers.recompute_modules with layernorm has no effect with TransformerEngine's layers: the norms are "
            "fused into the linear layers that follow them. Take layernorm out, or set layers.transformer_impl to local"
        )


def _auto(device: torch.device, compute_dtype: torch.dtype) -> tuple[str, str]:
    """Spec for "auto", and the reason."""
    if device.type != "cuda":
        return "local", f"on {device.type}"
    if compute_dtype not in (torch.bfloat16, torch.float16):
        return "local", f"{compute_dtype} is for exactness, not for speed"
    if problem := transformer_engine_problem(device):
        return "local", f"not transformer_engine: {problem}"
    return "transformer_engine", f"TransformerEngine {importlib.metadata.version('transformer-engine')} is installed"


def transformer_engine_problem(device: torch.device) -> str | None:
    """Why TransformerEngine's layers cannot run on `device`, or None."""
    if device.type != "cuda":
        return f"TransformerEngine needs a CUDA device, got {device.type}"
    if importlib.util.find_spec("transformer_engine") is None:
        return "TransformerEngine is not installed (pip install 'megatron-multiverse[gpu]')"
    if not mcore_te.HAVE_TE:
        return (
            "TransformerEngine is installed, but megatron-core could not import it: "
            "python -c 'import transformer_engine.pytorch' shows why"
        )
    return None


def _fp8_problem(recipe: str, compute_dtype: torch.dtype) -> str | None:
    if compute_dtype not in (torch.bfloat16, torch.float16):
        return f"FP8 goes with bf16 elsewhere (dtype bf16), got {compute_dtype}"
    try:
        from transformer_engine.pytorch import quantization
    except ImportError:
        version = importlib.metadata.version("transformer-engine")
        return f"TransformerEngine {version} is too old (pip install 'megatron-multiverse[gpu]')"
    supported = {
        "tensorwise": quantization.check_fp8_support,
        "blockwise": quantization.check_fp8_block_scaling_support,
    }
    works, reason = supported[recipe]()
    return None if works else str(reason)


@functools.cache
def _log_once(impl: str, reason: str) -> None:
    logger.info("transformer layers: %s (%s)", impl, reason)
