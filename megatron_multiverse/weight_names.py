"""One set of weight names, whichever layer spec a model was built with. Imports no torch.

TransformerEngine fuses each norm with the linear layer that follows it, so with that spec the norm's weight has
another name. Model folders and the name tables of checkpoints use the names of the local spec ("plain"); `torch_dist`
checkpoints use the fused ones, which megatron-core itself writes there for both specs.
"""

from __future__ import annotations

from collections.abc import Iterator

FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Plain name to fused name, below a layer's prefix."""

CORE_ATTENTION = "self_attention.core_attention"
"""The one module below with an extra state in TransformerEngine's spec alone."""
_WITH_EXTRA_STATE = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    CORE_ATTENTION,
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_QK_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")


def extra_state_modules(*, qk_layernorm: bool) -> Iterator[str]:
    """Modules of a layer that have an (empty) extra state in the local spec or in TransformerEngine's.

    megatron-core asks a `torch_dist` checkpoint for the extra states of its own spec, and loads none that lacks one:
    every checkpoint holds those of both.
    """
    yield from _WITH_EXTRA_STATE
    if qk_layernorm:
        yield from _QK_NORMS


def layer_extra_state(module: str) -> str:
    """Key of a layer's module's extra state in a `torch_dist` checkpoint, before the number of the layer."""
    return f"decoder.layers.{module}._extra_state"


FINAL_EXTRA_STATE = "decoder.final_layernorm._extra_state"
"""The same of the norm after the last layer (TransformerEngine's spec)."""


def fused_name(name: str) -> str:
    """megatron-core's name of the same tensor with TransformerEngine's layers."""
    for plain, fused in FUSED_NORMS.items():
        name = name.replace(plain, fused)
    return name


def plain_name(name: str) -> str:
    """megatron-core's name of the same tensor with the local layers."""
    for plain, fused in FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def is_extra_state(name: str) -> bool:
    """Whether a state dict entry is a module's extra state (megatron-core, TransformerEngine) and no weight.

    The FP8 recipes offered here keep no state between steps, so these entries never hold anything that counts.
    """
    return "_extra_state" in name
