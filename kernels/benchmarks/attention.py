"""Attention under the Multiverse mask beside causal attention and FlexAttention, on one GPU, in one run.

A case is measured only after its output and gradients were compared with float32 math on the same inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_multiverse.cli import parse_options
from megatron_multiverse.kernels.benchmarks.layouts import make_labels
from megatron_multiverse.kernels.benchmarks.record import Recorder
from megatron_multiverse.kernels.multiverse_attention import flash4, flex, tile_lists

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
TOLERANCE = 1e-2
"""Relative error (norms) of output and gradients in bfloat16 against float32."""


@dataclass
class Case:
    """Inputs of one length and layout; q [1, h, n, d], k and v [1, g, n, d]."""

    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    r: Tensor
    pairs: int

    @classmethod
    def make(cls, layout: str, n: int, heads: int, groups: int, dim: int) -> Case:
        torch.manual_seed(n)
        r, pairs = make_labels(layout, n)

        def draw(count: int) -> Tensor:
            # memory order [s, b, h, d], as megatron-core hands it over
            return torch.randn(n, 1, count, dim, device="cuda", dtype=torch.bfloat16).permute(1, 2, 0, 3)

        q, k, v, upstream = draw(heads), draw(groups), draw(groups), draw(heads)
        return cls(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream, r.cuda(), pairs)


def median(function: Callable[[], Any], milliseconds: int = 150) -> float:
    """Median time in ms."""
    from triton.testing import do_bench

    return float(do_bench(function, warmup=40, rep=milliseconds, return_mode="median"))


def relative_errors(case: Case, attention: Attention, exact: list[Tensor]) -> tuple[float, float]:
    """Relative error of the output, and the largest one of the three gradients."""
    out = attention(case.q, case.k, case.v)
    mine = [out, *torch.autograd.grad(out, (case.q, case.k, case.v), case.upstream)]
    errors = [float((x.detach().float() - y).norm() / y.norm()) for x, y in zip(mine, exact, strict=True)]
    return errors[0], max(errors[1:])


def exact_results(case: Case, causal: bool) -> list[Tensor]:
    """Output, dq, dk, dv by explicit matrices in float32, 512 queries at a time."""
    n, (h, g) = case.q.shape[2], (case.q.shape[1], case.k.shape[1])
    exact_k, exact_v = (x.detach().float().requires_grad_() for x in (case.k, case.v))
    place = torch.arange(n, device="cuda")
    labels = place if causal else case.r[0]
    out_exact, dq_exact = [], []
    dk, dv = torch.zeros_like(exact_k), torch.zeros_like(exact_v)
    for start in range(0, n, 512):
        rows = slice(start, min(start + 512, n))
        q = case.q[:, :, rows].detach().float().requires_grad_()
        visible = (place[None] <= place[rows, None]) & (labels[None] <= labels[rows, None])
        scores = (q.unflatten(1, (g, h // g)) @ exact_k[:, :, None].transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        part = (weights @ exact_v[:, :, None]).flatten(1, 2)
        grads = torch.autograd.grad(part, (q, exact_k, exact_v), case.upstream[:, :, rows].float())
        out_exact.append(part.detach())
        dq_exact.append(grads[0])
        dk += grads[1]
        dv += grads[2]
    return [torch.cat(out_exact, 2), torch.cat(dq_exact, 2), dk, dv]


def backends(case: Case) -> dict[str, tuple[Attention, bool]]:
    """Name -> (function, whether it is plain causal)."""
    found: dict[str, tuple[Attention, bool]] = {}

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    found["cudnn causal"] = cudnn, True
    flex_plan = flex.flex_plan(case.r, None, case.q.dtype)
    found["flex"] = (lambda q, k, v: flex.flex_attention(q, k, v, flex_plan)), False
    if flash4.flash4_problem("cuda", case.q.dtype, case.q.shape[-1]) is None:
        from flash_attn.cute import flash_attn_func

        def fa4_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        plan = flash4.flash4_plan(case.r, None, case.q.dtype)
        found["fa4 causal"] = fa4_causal, True
        found["flash4"] = (lambda q, k, v: flash4.flash4_attention(q, k, v, plan)), False
    return found


def measure(case: Case, attention: Attention, pairs: int) -> dict[str, float]:
    """Times in ms and TFLOP/s on visible pairs (forward 4 d h pairs, backward 10 d h pairs)."""
    out = attention(case.q, case.k, case.v)
    forward = median(lambda: attention(case.q, case.k, case.v))
    inputs = (case.q, case.k, case.v)
    backward = median(lambda: torch.autograd.grad(out, inputs, case.upstream, retain_graph=True))
    work = 4 * case.q.shape[-1] * case.q.shape[1] * pairs / 1e9
    return {
        "fwd_ms": forward,
        "bwd_ms": backward,
        "fwd_tflops": work / forward,
        "bwd_tflops": 2.5 * work / backward,
    }


def preparation_times(case: Case) -> dict[str, float]:
    """Times in us of what is done once per microbatch."""
    from torch.nn.attention.flex_attention import create_block_mask

    n, r = case.r.shape[1], case.r
    graph = torch.cuda.CUDAGraph()
    tile_lists(r)
    with torch.cuda.graph(graph):
        tile_lists(r)
    create = torch.compile(create_block_mask)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (r[0, k] <= r[0, q])

    def flex_mask() -> Any:
        return create(visible, None, None, n, n, device="cuda")

    flex_mask()
    return {
        "tile_lists_us": 1e3 * median(lambda: tile_lists(r), 50),
        "tile_lists_graph_us": 1e3 * median(graph.replay, 50),
        "flash4_plan_us": 1e3 * median(lambda: flash4.flash4_plan(r, None, case.q.dtype), 50)
        if flash4.flash4_problem("cuda", case.q.dtype, case.q.shape[-1]) is None
        else float("nan"),
        "flex_plan_us": 1e3 * median(lambda: flex.flex_plan(r, None, case.q.dtype), 50),
        "create_block_mask_compiled_us": 1e3 * median(flex_mask, 50),
    }


@dataclass
class Options:
    """What to measure."""

    lengths: list[int] = field(default_factory=lambda: [16384, 32768])
    """Tokens per sequence."""
    layouts: list[str] = field(default_factory=lambda: ["realistic", "wide"])
    """Names in layouts.py."""
    skip: list[str] = field(default_factory=list)
    """Names of rivals to leave out."""
    heads: int = 40
    groups: int = 8
    dim: int = 128
    output: str | None = None
    """Folder; default kernels/benchmarks/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


def main() -> None:
    """Run all cases."""
    options = parse_options(Options)
    warnings.filterwarnings("ignore")
    torch._functorch.config.donated_buffer = False  # the backward pass is timed many times over one graph
    recorder = Recorder("attention", options.output, options.commit)
    for n in options.lengths:
        for layout in options.layouts:
            case = Case.make(layout, n, options.heads, options.groups, options.dim)
            exact = {causal: exact_results(case, causal) for causal in (False, True)}
            for name, (attention, causal) in backends(case).items():
                if name in options.skip:
                    continue
                out_error, grad_error = relative_errors(case, attention, exact[causal])
                if not max(out_error, grad_error) < TOLERANCE:
                    print(f"NOT COUNTED: {name} n={n} {layout}: errors {out_error:.2e} {grad_error:.2e}", flush=True)
                    continue
                pairs = n * (n + 1) // 2 if causal else case.pairs
                recorder.add(
                    n=n,
                    layout=layout,
                    attention=name,
                    visible_over_causal=pairs / (n * (n + 1) / 2),
                    **measure(case, attention, pairs),
                    out_error=out_error,
                    grad_error=grad_error,
                )
                recorder.table("TFLOP/s on visible pairs; errors relative to float32; medians.")
        for key, value in preparation_times(case).items():
            print(f"n={n} {key} {value:.1f}", flush=True)


if __name__ == "__main__":
    main()
