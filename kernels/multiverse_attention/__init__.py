"""Attention under the Multiverse visibility rule (arXiv 2506.09991, section 4): `multiverse_attention`.

Importing this needs torch alone; Triton, FlexAttention and FlashAttention 4 are imported when a backend is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import BACKENDS, check_backend, choose_backend
from .choose_tiles import tile_lists
from .layout import AttentionCase, AttentionLayout
from .reference import count_visible_pairs, multiverse_attention_reference, visibility
from .tiles import TileLists


def multiverse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    *,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention under the visibility rule: query i sees key j iff j is not later and no block has them in
    different paths.

    Args:
        q: [b, h, s_q, d], rotated.
        k: [b, g, s_k, d], rotated; head i of q uses head i // (h / g).
        v: [b, g, s_k, d].
        layout: labels of the tokens; hand the same object to every layer of a microbatch.
        softmax_scale: factor on the scores; default d ** -0.5.
        backend: a name in `BACKENDS`, or "auto" for the fastest that runs here.

    Returns:
        [b, h, s_q, d] in q's dtype; 0 for a query that sees no key.

    Raises:
        ConfigError: the backend does not exist or cannot run here.
        ValueError: the shapes do not fit the layout.
    """
    case = AttentionCase(
        q.device.type,
        q.dtype,
        q.shape[-1],
        deterministic=torch.are_deterministic_algorithms_enabled(),
        placed=layout.index is not None,
    )
    if backend == "auto":
        backend = choose_backend(backend, case)
    check_backend(backend, case)
    chosen = BACKENDS[backend]
    layout.check(q, k, v)
    return chosen.attend(q, k, v, layout.plan(chosen.prepare, case), softmax_scale)


__all__ = [
    "BACKENDS",
    "AttentionCase",
    "AttentionLayout",
    "TileLists",
    "check_backend",
    "choose_backend",
    "count_visible_pairs",
    "multiverse_attention",
    "multiverse_attention_reference",
    "tile_lists",
    "visibility",
]
