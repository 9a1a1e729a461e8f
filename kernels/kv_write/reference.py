"""From megatron-core's mixed projection to a rotated query and new entries of the cache: the plain version."""

from __future__ import annotations

from torch import Tensor

from megatron_multiverse.kernels.fused_linear import rms_norm
from megatron_multiverse.kernels.rope import rotate_by_table, rotate_qkv_by_table


def write_kv_reference(
    mixed: Tensor,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    tokens: Tensor | None,
    *,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Split the projection, norm and rotate query and key, and write keys and values into their slots.

    Args:
        mixed: ``[n, kv heads, (heads per kv head + 2) * head dim]``; per kv head its queries, its key, its value.
        table: ``[1, n, head dim]`` by `rope_table`.
        keys: ``[slots, kv heads, head dim]``, the cache of one layer; written in place.
        values: same shape as `keys`; written in place.
        slots: int64 ``[m]``, all different; -1 (not here, but in the kernel) writes nothing.
        tokens: int64 ``[m]``, the token each slot receives; None: slot i receives token i.
        query_norm: ``[head dim]``, scale of an RMSNorm of every query head (Qwen3), or None.
        key_norm: the same for the keys; both or none.
        eps: of the norms.

    Returns:
        The rotated query ``[n, heads, head dim]``.
    """
    dim = table.shape[-1]
    if query_norm is None or key_norm is None:
        query, key, value = (x[:, 0] for x in rotate_qkv_by_table(mixed[:, None], table))
    else:
        heads = mixed.unflatten(-1, (-1, dim))
        query = rms_norm(heads[..., :-2, :].flatten(1, 2), query_norm, eps)
        key, value = rms_norm(heads[..., -2, :], key_norm, eps), heads[..., -1, :]
        query, key = (rotate_by_table(x[:, None], table)[:, 0] for x in (query, key))
    if tokens is not None:
        key, value = key.index_select(0, tokens), value.index_select(0, tokens)
    keys.index_copy_(0, slots, key)
    values.index_copy_(0, slots, value)
    return query
