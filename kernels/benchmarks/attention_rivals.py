"""The attention functions that benchmarks/attention.py measures, ours and the rivals, on the same tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_multiverse.kernels.multiverse_attention import AttentionLayout, flash4, flex

DETERMINISTIC = "flash4, deterministic"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [1, h, n, d], k [1, g, n, d], v [1, g, n, d]) -> [1, h, n, d]; tensors are views of [n, 1, heads, d]."""


@dataclass
class Rival:
    """One attention function."""

    name: str
    call: Attention
    causal: bool
    """Plain causal attention: it does the same whatever the layout."""
    keeps_graph: bool = True
    """Whether the backward pass can run twice on one forward pass."""


def sdpa_causal(backend: SDPBackend) -> Attention:
    """torch's scaled_dot_product_attention with one of its kernels."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return call


def fa4_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 4's own causal kernel."""
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def transformer_engine(heads: int, groups: int, dim: int, hidden: Tensor | None = None) -> tuple[str, Attention]:
    """Name and function of TransformerEngine's DotProductAttention: causal, or `arbitrary` with hidden pairs True."""
    from transformer_engine.pytorch import DotProductAttention

    kind = "causal" if hidden is None else "arbitrary"
    layer = DotProductAttention(heads, dim, num_gqa_groups=groups, attention_dropout=0.0, attn_mask_type=kind)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = layer(*(x.permute(2, 0, 1, 3) for x in (q, k, v)), attention_mask=hidden, attn_mask_type=kind)
        return out.unflatten(-1, (heads, dim)).permute(1, 2, 0, 3)

    return f"TransformerEngine {kind}", call


def block_mask_maker(r: Tensor) -> Callable[[], Any]:
    """A function that makes the block mask of labels r [1, n] as FlexAttention does itself, by compiled code."""
    from torch.nn.attention.flex_attention import create_block_mask

    create, n = torch.compile(create_block_mask), r.shape[1]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (r[b, k] <= r[b, q])

    return lambda: create(visible, 1, None, n, n, device="cuda")


def causal_rivals(q: Tensor, k: Tensor) -> list[Rival]:
    """Everything that knows plain causal attention."""
    found = [
        Rival("cuDNN causal (SDPA)", sdpa_causal(SDPBackend.CUDNN_ATTENTION), True),
        Rival("FA2 causal (SDPA)", sdpa_causal(SDPBackend.FLASH_ATTENTION), True),
    ]
    if flash4.flash4_problem("cuda", q.dtype, q.shape[-1]) is None:
        found.append(Rival("FA4 causal", fa4_causal, True))
    try:
        found.append(Rival(*transformer_engine(q.shape[1], k.shape[1], q.shape[-1]), True, keeps_graph=False))
    except (ImportError, OSError) as error:
        print(f"without TransformerEngine: {error}", flush=True)
    return found


def deterministic_plan(layout: AttentionLayout, dtype: torch.dtype) -> flash4.Flash4Plan:
    """A plan as it is made under torch.use_deterministic_algorithms; it keeps to it outside."""
    torch.use_deterministic_algorithms(True)
    try:
        return flash4.flash4_plan(layout, dtype)
    finally:
        torch.use_deterministic_algorithms(False)


def masked_rivals(r: Tensor, q: Tensor, k: Tensor, arbitrary: bool) -> list[Rival]:
    """Everything that takes the mask of labels r [1, n], n a flex bucket; `arbitrary` adds what holds the mask."""
    layout, n = AttentionLayout(r), r.shape[1]
    ours = flex.flex_plan(layout, q.dtype)

    def flex_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex.flex_attention(q, k, v, theirs())

    @functools.cache
    def theirs() -> Any:
        return flex.FlexPlan(block_mask_maker(r)(), n, n)

    found = [
        Rival("FlexAttention, create_block_mask", flex_alone, False),
        Rival("flex (our lists)", lambda q, k, v: flex.flex_attention(q, k, v, ours), False),
    ]
    if flash4.flash4_problem("cuda", q.dtype, q.shape[-1]) is None:
        plan = flash4.flash4_plan(layout, q.dtype)
        found.append(Rival("flash4", lambda q, k, v: flash4.flash4_attention(q, k, v, plan), False))
        in_order = deterministic_plan(layout, q.dtype)
        found.append(Rival(DETERMINISTIC, lambda q, k, v: flash4.flash4_attention(q, k, v, in_order), False))
    if arbitrary:
        place = torch.arange(r.shape[1], device=r.device)
        hidden = (place[None] > place[:, None]) | (r[0][None] > r[0][:, None])
        with contextlib.suppress(ImportError, OSError):
            found.append(
                Rival(
                    *transformer_engine(q.shape[1], k.shape[1], q.shape[-1], hidden[None, None]),
                    False,
                    keeps_graph=False,
                )
            )
    return found
