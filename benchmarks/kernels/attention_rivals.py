"""The attention functions that attention.py measures, ours and the rivals, on the same tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_multiverse.kernels.multiverse_attention import AttentionCase, AttentionLayout, flash4, flex

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [1, h, n, d], k [1, g, n, d], v [1, g, n, d]) -> [1, h, n, d]; tensors are views of [n, 1, heads, d]."""

MAIN = 32768
"""The length at which all rivals run. At larger ones only cuDNN and flash4 do."""
SHORT = 4096
"""The largest length for attention that holds the whole mask. FlexAttention is left out there."""


@dataclass
class Rival:
    """One attention function."""

    name: str
    call: Attention
    causal: bool = False
    """Plain causal attention, which does the same in every case."""
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


def transformer_engine(q: Tensor, k: Tensor, hidden: Tensor | None = None) -> Rival | None:
    """TransformerEngine's DotProductAttention: causal, or `arbitrary` with hidden pairs True; None if it is missing."""
    try:
        from transformer_engine.pytorch import DotProductAttention
    except (ImportError, OSError) as error:
        print(f"without TransformerEngine: {error}", flush=True)
        return None
    kind, heads, dim = "causal" if hidden is None else "arbitrary", q.shape[1], q.shape[3]
    layer = DotProductAttention(heads, dim, num_gqa_groups=k.shape[1], attention_dropout=0.0, attn_mask_type=kind)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = layer(*(x.permute(2, 0, 1, 3) for x in (q, k, v)), attention_mask=hidden, attn_mask_type=kind)
        return out.unflatten(-1, (heads, dim)).permute(1, 2, 0, 3)

    return Rival(f"TransformerEngine {kind}", call, causal=hidden is None, keeps_graph=False)


def block_mask_maker(r: Tensor, *, compiled: bool = True) -> Callable[[], Any]:
    """A function that makes the block mask of labels r [1, n] as FlexAttention does itself. What r holds may change."""
    from torch.nn.attention.flex_attention import create_block_mask

    create, n = torch.compile(create_block_mask) if compiled else create_block_mask, r.shape[1]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (r[b, k] <= r[b, q])

    return lambda: create(visible, 1, None, n, n, device="cuda")


def causal_rivals(q: Tensor, k: Tensor, layout: str) -> Iterator[Rival]:
    """Plain causal attention, as far as it is run beside this case at this length."""
    n = q.shape[2]
    yield Rival("cuDNN causal (SDPA)", sdpa_causal(SDPBackend.CUDNN_ATTENTION), causal=True)
    if n <= MAIN and flash4.flash4_problem(case_of(q)) is None:
        yield Rival("FA4 causal", fa4_causal, causal=True)
    if SHORT < n <= MAIN and layout == "causal":
        yield Rival("FA2 causal (SDPA)", sdpa_causal(SDPBackend.FLASH_ATTENTION), causal=True)
        if found := transformer_engine(q, k):
            yield found


def masked_rivals(q: Tensor, k: Tensor, r: Tensor, layout: str) -> Iterator[Rival]:
    """Attention under the mask of labels r [1, n], as far as it is run on this case at this length. n must be a length
    that FlexAttention does not pad."""
    labels, n, case = AttentionLayout(r), r.shape[1], case_of(q)
    if flash4.flash4_problem(case) is None:
        yield flash4_rival("flash4", labels, case)
        if (n, layout) == (MAIN, "realistic"):
            in_order = AttentionCase(case.device_type, case.dtype, case.head_dim, deterministic=True)
            yield flash4_rival("flash4, deterministic", labels, in_order)
    if SHORT < n <= MAIN:
        yield flex_rival("flex (our lists)", lambda: flex.flex_plan(labels, case))
    if (n, layout) == (MAIN, "realistic"):
        yield flex_rival("FlexAttention, create_block_mask", lambda: flex.FlexPlan(block_mask_maker(r)(), n, n))
    if n <= SHORT:
        place = torch.arange(n, device=r.device)
        hidden = (place[None] > place[:, None]) | (r[0][None] > r[0][:, None])
        if found := transformer_engine(q, k, hidden[None, None]):
            yield found


def case_of(q: Tensor) -> AttentionCase:
    """The case that our backends are asked about for q."""
    return AttentionCase(q.device.type, q.dtype, q.shape[-1])


def flash4_rival(name: str, layout: AttentionLayout, case: AttentionCase) -> Rival:
    """Our backend with a plan made once."""
    plan = flash4.flash4_plan(layout, case)
    return Rival(name, lambda q, k, v: flash4.flash4_attention(q, k, v, plan))


def flex_rival(name: str, make_plan: Callable[[], flex.FlexPlan]) -> Rival:
    """FlexAttention with a plan made at its first call."""
    plan = functools.cache(make_plan)
    return Rival(name, lambda q, k, v: flex.flex_attention(q, k, v, plan()))
