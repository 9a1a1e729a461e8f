"""The fused rotation beside torch's unfused one and a plain copy of the same bytes, on one GPU, in one run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_multiverse.cli import parse_options
from megatron_multiverse.kernels.benchmarks.record import Recorder
from megatron_multiverse.kernels.rope import inverse_frequencies, rope_angles, rope_reference, rope_table
from megatron_multiverse.kernels.rope.fused import rope_fused

TOLERANCE = 4e-3
"""Relative error in bfloat16 against float64."""


@dataclass
class Options:
    """What to measure."""

    tokens: int = 32768
    heads: int = 40
    groups: int = 8
    dim: int = 128
    output: str | None = None
    """Folder; default kernels/benchmarks/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


def main() -> None:
    """Run all cases."""
    from triton.testing import do_bench

    o = parse_options(Options)
    recorder = Recorder("rope", o.output, o.commit)
    torch.manual_seed(0)
    q, k, gq, gk = (
        torch.randn(o.tokens, 1, heads, o.dim, device="cuda", dtype=torch.bfloat16)
        for heads in (o.heads, o.groups, o.heads, o.groups)
    )
    q.requires_grad_(), k.requires_grad_()
    ids = torch.randint(0, o.tokens, (1, o.tokens), device="cuda")
    inv_freq = inverse_frequencies(o.dim, 1e6, "cuda", torch.float32)
    table, angles = rope_table(ids, inv_freq), rope_angles(ids, inv_freq)
    moved = 2 * (q.numel() + k.numel()) * q.element_size()
    both, target = torch.cat((q, k), 2).detach(), torch.empty(o.tokens, 1, o.heads + o.groups, o.dim).cuda().bfloat16()
    cases = {
        "copy": (lambda: target.copy_(both), None),
        "unfused": (lambda: (rope_reference(q, angles), rope_reference(k, angles)), 1.0),
        "fused": (lambda: rope_fused(q, k, table), 1.0),
    }
    for name, (function, checked) in cases.items():
        error = None
        if checked:
            out = function()
            grads = torch.autograd.grad(out, (q, k), (gq, gk), retain_graph=True)
            exact = [rope_reference(x.detach().double(), angles.double()) for x in (q, k)]
            exact += [rope_reference(x.double(), -angles.double()) for x in (gq, gk)]
            errors = [
                float((x.detach().double() - y).norm() / y.norm()) for x, y in zip((*out, *grads), exact, strict=True)
            ]
            error = max(errors)
            if not error < TOLERANCE:
                print(f"NOT COUNTED: {name}: error {error:.2e}", flush=True)
                continue
        with torch.no_grad():
            forward = do_bench(function, warmup=50, rep=150, return_mode="median")
        row = {"case": name, "tokens": o.tokens, "fwd_us": 1e3 * forward, "fwd_tb_s": moved / forward / 1e9}
        if checked:
            out = function()
            backward = do_bench(
                lambda out=out: torch.autograd.grad(out, (q, k), (gq, gk), retain_graph=True),
                warmup=50,
                rep=150,
                return_mode="median",
            )
            row |= {"bwd_us": 1e3 * backward, "bwd_tb_s": moved / backward / 1e9, "error": error}
        recorder.add(**row)
    recorder.table("TB/s count each of q and k read once and written once; the table is extra.")


if __name__ == "__main__":
    main()
