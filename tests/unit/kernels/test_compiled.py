"""Kernels that several GPUs run together compile for Hopper: Triton brings the assembler, no GPU is needed."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_sum_with_norm_compiles(dtype: str) -> None:
    """Triton's interpreter takes what the assembler refuses."""
    from triton.backends.compiler import GPUTarget

    from megatron_multiverse.kernels.sum_norm.triton_push import _sum_norm_kernel

    constants = {"RANK": 0, "RANKS": 2, "LANES": 4096, "PDL": True}
    types = [f"*{dtype}"] * 6 + ["*i32", "*i64", "*i64", "i32", "i32", "i32", "fp32"] + ["constexpr"] * len(constants)
    names = [parameter.name for parameter in _sum_norm_kernel.params]
    source = triton.compiler.ASTSource(
        fn=_sum_norm_kernel, signature=dict(zip(names, types, strict=True)), constexprs=constants
    )
    options = {"num_warps": 8, "launch_pdl": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "ld.volatile" in compiled.asm["ptx"] and compiled.asm["cubin"]
