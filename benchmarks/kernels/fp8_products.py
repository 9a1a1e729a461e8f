"""Products of a decode step with weights in FP8, beside the same in bfloat16 and by torch._scaled_mm, on one GPU.

`bf16` multiplies by weights in bfloat16. `widened` turns the FP8 weights into bfloat16 in each call. `ours` is what the
engine does with FP8 weights. `scaled_mm` multiplies the same two FP8 parts of the tokens (`split_rows`) by torch's
kernel, and `rounded` tokens that are rounded to FP8 once, which is half the work and changes what the model says. Each
is a CUDA graph of calls over weights that take turns, so that none is left in the L2 cache from the call before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.record import Recorder
from benchmarks.kernels.timing import Step, captured, in_turns
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.kernels.fused_linear import FP8, dequantize_rows, linear, quantize_rows
from megatron_multiverse.kernels.fused_linear.scaled import split_linear

L2_BYTES = 200 << 20
"""More than any L2 cache has."""


@dataclass
class Options:
    """What to measure."""

    rows: tuple[int, ...] = (1, 8, 32, 48, 128, 256, 512, 2048, 4096)
    """Tokens."""
    products: tuple[tuple[int, int], ...] = ((3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584))
    """(inputs, outputs): those of a layer of Qwen2.5-7B."""
    rounds: int = 2
    """Turns of each way; the median of all calls counts."""
    output: str | None = None
    """Folder; default benchmarks/kernels/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


Weights = tuple[Tensor, Tensor, Tensor]
"""In bfloat16, in FP8, and the scales of the latter."""


def widened(x: Tensor, weights: Weights) -> Tensor:
    """By weights that are made anew in bfloat16."""
    return F.linear(x, dequantize_rows(weights[1], weights[2], x.dtype))


def rounded(x: Tensor, weights: Weights) -> Tensor:
    """By tokens rounded to FP8, with a scale for each."""
    scale = (x.abs().amax(1, keepdim=True) / torch.finfo(FP8).max).float()
    return torch._scaled_mm((x / scale).to(FP8), weights[1].t(), scale, weights[2][None], out_dtype=x.dtype)


WAYS: dict[str, Callable[[Tensor, Weights], Tensor]] = {
    "bf16": lambda x, weights: linear(x, weights[0]),
    "widened": widened,
    "ours": lambda x, weights: linear(x, weights[1], None, weights[2]),
    "scaled_mm": lambda x, weights: split_linear(x, *weights[1:]),
    "rounded": rounded,
}


def main() -> None:
    """Run all cases."""
    o = parse_options(Options)
    recorder = Recorder("fp8_products", o.output, o.commit, key=("rows", "inputs", "outputs"))
    for inputs, outputs in o.products:
        copies = -(-L2_BYTES // (inputs * outputs))
        wide = torch.randn(outputs, inputs, device="cuda") * inputs**-0.5
        weight, scale = quantize_rows(wide)
        exact = dequantize_rows(weight, scale, torch.float64)
        weights = [(exact.bfloat16(), weight.clone(), scale) for _ in range(copies)]
        for rows in o.rows:
            x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
            measure(recorder, o, x, weights, x.double() @ exact.t())
    recorder.table(
        "Microseconds of one product, and for each way the relative error against float64. `ours` is what the engine "
        "did at that commit: `scaled_mm` for 33 to 512 rows at e7a4f4c and for 33 to 2,048 since, `widened` for more. "
        "All ways are described in benchmarks/kernels/fp8_products.py."
    )


def measure(recorder: Recorder, o: Options, x: Tensor, weights: list[Weights], want: Tensor) -> None:
    """Check one case against float64, time all ways in turns, and record it."""
    graphs, errors = {}, {}
    for name, way in WAYS.items():
        got = way(x, weights[0]).double()
        errors[f"{name}_error"] = float((got - want).norm() / want.norm())
        graphs[name] = captured([partial(way, x, one) for one in weights])
    times = in_turns({name: Step.of(graph.replay) for name, graph in graphs.items()}, o.rounds)
    row = {f"{name}_us": 1e3 * time / len(weights) for name, time in times.items()}
    recorder.add(rows=len(x), inputs=x.shape[1], outputs=want.shape[1], **row, **errors)


if __name__ == "__main__":
    run_tool(main)
