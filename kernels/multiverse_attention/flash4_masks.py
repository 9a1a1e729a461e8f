"""Our rule as FlashAttention 4's `mask_mod`: what any version of it compiles, with or without flash4_kernels.py.

Only flash4.py and flash4_kernels.py import this, and only where flash_attn.cute is there.
"""

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


@cute.jit
def ordered(b, h, q, k, seqlen_info, aux):
    """The rule where queries and keys are the tokens in their order: aux = [r [b, s]]."""
    r_k = utils.scalar_to_ssa(aux[0][b[0], k[0]], cutlass.Int32)
    r_q = utils.scalar_to_ssa(aux[0][b[0], q[0]], cutlass.Int32)
    return (k <= q) & (r_k <= r_q)


@cute.jit
def placed(b, h, q, k, seqlen_info, aux):
    """The rule for tokens in any order: aux = [r [b, s_q], index [b, s_q], key_r [b, s_k], key_index [b, s_k]]."""
    r_q = utils.scalar_to_ssa(aux[0][b[0], q[0]], cutlass.Int32)
    i_q = utils.scalar_to_ssa(aux[1][b[0], q[0]], cutlass.Int32)
    r_k = utils.scalar_to_ssa(aux[2][b[0], k[0]], cutlass.Int32)
    i_k = utils.scalar_to_ssa(aux[3][b[0], k[0]], cutlass.Int32)
    return (i_k <= i_q) & (r_k <= r_q)
