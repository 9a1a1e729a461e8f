"""How the layers of a model are computed: nothing here changes its shape or the names of its weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megatron_multiverse.config.strict import check, check_choices

RECOMPUTABLE = ("core_attn", "mlp", "layernorm")
LOSS_CHUNK_TOKENS = 4096
"""Unless `loss_chunk_tokens` says otherwise: logits of so many tokens are small beside the other activations."""


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Attention kernel, layer spec, FP8 and activation recompute, in megatron-core's names."""

    attention_backend: Literal["auto", "flash4", "flex", "dense"] = "auto"
    """Attention kernel: FlashAttention 4 (Hopper), FlexAttention (other GPUs), a dense mask (everywhere, float32 too);
    auto takes the fastest that runs, and logs why."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers of TransformerEngine or plain ones; auto takes TransformerEngine on CUDA where it is installed and the
    matrix products are bf16, and logs why."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """FP8 matrix products in the linear layers (TransformerEngine): e4m3 throughout, or hybrid with e5m2 gradients;
    attention, embedding and output layer stay bf16. Unset for none."""
    fp8_recipe: Literal["tensorwise", "blockwise"] = "tensorwise"
    """How FP8 scales are found: tensorwise has one scale per tensor, blockwise one per 1x128 activations and 128x128
    weights. Both compute them from the tensor itself, so no history is carried from step to step."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Which activations are computed again in the backward pass instead of kept: selective those of
    recompute_modules, full those of whole layers. Unset keeps all. Needs CUDA."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """For granularity full: uniform recomputes all layers, in chunks of recompute_num_layers; block recomputes only
    the first recompute_num_layers layers."""
    recompute_num_layers: int = 1
    """For granularity full: see recompute_method."""
    recompute_modules: tuple[str, ...] = ("mlp",)
    """For granularity selective: any of core_attn, mlp, layernorm (local layers only). The MLP's activations take the
    most memory; core_attn saves little, since the flash kernels recompute by themselves."""
    loss_chunk_tokens: int | None = None
    """Tokens of a microbatch whose logits are in memory at the same time in a training step; 0 computes those of all
    tokens at once, as the engine deepspeed always does. Unset for 4096."""

    def __post_init__(self) -> None:
        check_choices(self, "layers.")
        check(
            self.fp8 is None or self.transformer_impl != "local",
            "layers.fp8 needs TransformerEngine's layers: set layers.transformer_impl to auto or transformer_engine",
        )
        chunk = self.loss_chunk_tokens
        check(
            chunk is None or chunk >= 0,
            f"layers.loss_chunk_tokens must be unset, 0 (all tokens at once) or a number of tokens, got {chunk}",
        )
        number = self.recompute_num_layers
        check(number >= 1, f"layers.recompute_num_layers must be at least 1, got {number}")
        unknown = [name for name in self.recompute_modules if name not in RECOMPUTABLE]
        check(not unknown, f"layers.recompute_modules: {unknown} unknown, allowed: {', '.join(RECOMPUTABLE)}")
        self._check_effect()

    def _check_effect(self) -> None:
        """Refuse what was set but would change nothing."""
        check(
            self.recompute_granularity != "selective" or bool(self.recompute_modules),
            f"layers.recompute_granularity selective needs recompute_modules, allowed: {', '.join(RECOMPUTABLE)}",
        )
        needs = {
            "fp8_recipe": (self.fp8 is not None, "fp8 e4m3 or hybrid"),
            "recompute_method": (self.recompute_granularity == "full", "recompute_granularity full"),
            "recompute_num_layers": (self.recompute_granularity == "full", "recompute_granularity full"),
            "recompute_modules": (self.recompute_granularity == "selective", "recompute_granularity selective"),
        }
        for field_ in dataclasses.fields(self):
            if field_.name in needs:
                has_effect, needed = needs[field_.name]
                value = getattr(self, field_.name)
                check(
                    has_effect or value == field_.default,
                    f"layers.{field_.name} {value!r} has no effect without layers.{needed}: set both or neither",
                )

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk of the loss; 0 computes the loss of all tokens at once."""
        return LOSS_CHUNK_TOKENS if self.loss_chunk_tokens is None else self.loss_chunk_tokens

    def recomputes(self, module: str) -> bool:
        """Whether selective recompute of this module was asked for."""
        return self.recompute_granularity == "selective" and module in self.recompute_modules
