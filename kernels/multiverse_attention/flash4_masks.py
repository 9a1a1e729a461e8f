"""The visibility rule as FlashAttention 4 wants it: CuTe functions that its kernels compile in.

A module of its own because CuTe reads the source of these functions and resolves names at module level.
Only flash4.py imports it, and only where flash_attn.cute is there.
"""

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


@cute.jit
def ordered(b, h, q, k, seqlen_info, aux):
    """Tokens in their order: aux = [r [b, s]]."""
    r_k = utils.scalar_to_ssa(aux[0][b[0], k[0]], cutlass.Int32)
    r_q = utils.scalar_to_ssa(aux[0][b[0], q[0]], cutlass.Int32)
    return (k <= q) & (r_k <= r_q)


@cute.jit
def permuted(b, h, q, k, seqlen_info, aux):
    """Tokens in any order: aux = [r [b, s], index [b, s]]."""
    r_k = utils.scalar_to_ssa(aux[0][b[0], k[0]], cutlass.Int32)
    r_q = utils.scalar_to_ssa(aux[0][b[0], q[0]], cutlass.Int32)
    i_k = utils.scalar_to_ssa(aux[1][b[0], k[0]], cutlass.Int32)
    i_q = utils.scalar_to_ssa(aux[1][b[0], q[0]], cutlass.Int32)
    return (i_k <= i_q) & (r_k <= r_q)
