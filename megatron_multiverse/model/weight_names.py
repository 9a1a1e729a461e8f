"""One set of weight names, whichever layer spec a model was built with. Imports no torch.

TransformerEngine fuses each norm with the linear layer behind it, so with that spec the norm's weight has another
name. Model folders and the name tables of conversion use the names of the local spec ("plain"); `torch_dist`
checkpoints use the fused ones, which megatron-core itself writes there for both specs.
"""

from __future__ import annotations

FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Plain name to fused name, below a layer's prefix."""


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
