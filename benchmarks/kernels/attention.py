"""Attention under the Multiverse mask beside its rivals, on one GPU, in one run.

`python -m benchmarks.kernels.attention` runs every case; `--cases`, `--lengths` and
`--attention` choose some, and what they measure replaces those rows alone. A case counts only after its output and
gradients were compared with float32 math on the same inputs.

The functions take turns in random order and warm up themselves (`timing.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.kernels.attention_rivals import (
    MAIN,
    SHORT,
    Attention,
    Rival,
    block_mask_maker,
    case_of,
    causal_rivals,
    masked_rivals,
)
from benchmarks.kernels.cases import CASES, make_labels, make_r
from benchmarks.kernels.record import Recorder
from benchmarks.kernels.timing import Step, in_turns, matmul_rate
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.kernels.multiverse_attention import AttentionLayout, flash4, tile_lists

TOLERANCE = 1e-2
"""Relative error (norms) of output and gradients in bfloat16 against float32."""
DATASHEET = 989.0
"""bfloat16 TFLOP/s that NVIDIA states for the H100 and H200 (SXM)."""
OVER = {"cudnn": "cuDNN causal (SDPA)", "fa4": "FA4 causal", "flex": "flex (our lists)"}
"""The rivals that each row is compared with, by TFLOP/s."""
NOTE = (
    "TFLOP/s on visible pairs (plain causal attention: on all causal ones), forward 4 d h pairs, backward 10 d h; "
    "`over` cuDNN, FA4 and flex: ratio of TFLOP/s to that kernel in the same rounds; speedup: cuDNN causal's time over "
    "this one's; errors are relative to float32; medians of rounds in which all take turns. prepare_us: once per "
    "microbatch."
)
ROWS_TIMES_KEYS = 2**25
"""How many scores the check computes at a time."""
KEY = ("tokens", "layout", "attention", "heads", "groups", "dim")
"""The columns that identify a row: measuring the same again replaces it."""


@dataclass
class Options:
    """What to measure."""

    lengths: list[int] = field(default_factory=lambda: [4096, 16384, 32768, 131072])
    """Tokens. The shortest and the longest run the realistic case alone."""
    cases: list[str] = field(default_factory=lambda: list(CASES))
    """Names in `cases.CASES`."""
    attention: list[str] = field(default_factory=list)
    """What to measure, by the beginnings of names; default everything."""
    heads: int = 40
    groups: int = 8
    dim: int = 128
    rounds: int = 3
    """How often each attention function gets its turn."""
    preparation: bool = True
    """Also time what is done once per microbatch."""
    output: str | None = None
    """Folder; default benchmarks/kernels/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


class Inputs:
    """q [1, h, n, d], k and v [1, g, n, d] in bfloat16, in the memory order [n, 1, heads, d] of megatron-core."""

    def __init__(self, n: int, heads: int, groups: int, dim: int, device: str = "cuda") -> None:
        generator = torch.Generator(device).manual_seed(n)

        def draw(count: int) -> Tensor:
            x = torch.randn(n, 1, count, dim, generator=generator, device=device, dtype=torch.bfloat16)
            return x.permute(1, 2, 0, 3)

        self.q, self.k, self.v = (draw(x).requires_grad_() for x in (heads, groups, groups))
        self.upstream = draw(heads)
        self.causal_errors: dict[str, tuple[float, float]] = {}

    def run(self, attention: Attention) -> list[Tensor]:
        """Output, dq, dk, dv."""
        out = attention(self.q, self.k, self.v)
        return [out.detach(), *torch.autograd.grad(out, (self.q, self.k, self.v), self.upstream)]


def exact_results(inputs: Inputs, labels: Tensor, group: int) -> list[Tensor]:
    """Output, dq, dk, dv of one key/value head and its queries, by explicit matrices in float32, rows by rows."""
    n, each = inputs.q.shape[2], inputs.q.shape[1] // inputs.k.shape[1]
    own = slice(group * each, (group + 1) * each)
    q, upstream = inputs.q.detach()[0, own].float(), inputs.upstream[0, own].float()
    k, v = (x.detach()[0, group].float() for x in (inputs.k, inputs.v))
    place, scale = torch.arange(n, device=q.device), q.shape[-1] ** -0.5
    out, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    step = max(128, ROWS_TIMES_KEYS // n)
    for start in range(0, n, step):
        rows, keys = slice(start, min(start + step, n)), slice(0, min(start + step, n))
        seen = (place[None, keys] <= place[rows, None]) & (labels[None, keys] <= labels[rows, None])
        p = ((q[:, rows] @ k[keys].T) * scale).masked_fill_(~seen, -torch.inf).softmax(-1)
        out[:, rows] = p @ v[keys]
        dv[keys] += torch.einsum("hqk,hqd->kd", p, upstream[:, rows])
        mean = (out[:, rows] * upstream[:, rows]).sum(-1, keepdim=True)
        ds = (upstream[:, rows] @ v[keys].T).sub_(mean).mul_(p).mul_(scale)
        dq[:, rows] = ds @ k[keys]
        dk[keys] += torch.einsum("hqk,hqd->kd", ds, q[:, rows])
    return [out, dq, dk, dv]


def errors(inputs: Inputs, rivals: list[Rival], labels: Tensor) -> dict[str, tuple[float, float]]:
    """Relative error of the output, and the largest one of the three gradients, of each attention function.

    All tokens of the first and of the last key/value head (of long sequences: of the second) and of the queries that
    go with them are compared.
    """
    each = inputs.q.shape[1] // inputs.k.shape[1]
    if not rivals:
        return {}
    groups = sorted({0, inputs.k.shape[1] - 1}) if inputs.q.shape[2] <= MAIN else [min(1, inputs.k.shape[1] - 1)]
    exact = {group: exact_results(inputs, labels, group) for group in groups}
    found = {}
    for rival in rivals:
        mine, worst = inputs.run(rival.call), [0.0, 0.0]
        for group in groups:
            own = slice(group * each, (group + 1) * each)
            parts = [mine[0][0, own], mine[1][0, own], mine[2][0, group], mine[3][0, group]]
            off = [float((x.float() - y).norm() / y.norm()) for x, y in zip(parts, exact[group], strict=True)]
            worst = [max(worst[0], off[0]), max(worst[1], *off[1:])]
        found[rival.name] = (worst[0], worst[1])
    return found


def measure(inputs: Inputs, rivals: list[Rival], rounds: int) -> dict[str, tuple[float, float]]:
    """Median times in ms, (forward, backward), of each attention function."""
    leaves = inputs.q, inputs.k, inputs.v
    steps: dict[str, Step] = {}

    def forward(call: Attention, _: Any = None) -> Tensor:
        return call(*leaves)

    def backward(out: Tensor, keep: bool = True) -> None:
        torch.autograd.grad(out, leaves, inputs.upstream, retain_graph=keep)

    for rival in rivals:
        steps[f"{rival.name}/f"] = Step(partial(forward, rival.call))
        if rival.keeps_graph:
            out = forward(rival.call)
            steps[f"{rival.name}/b"] = Step(backward, partial(lambda x: x, out))
        else:
            steps[f"{rival.name}/b"] = Step(partial(backward, keep=False), partial(forward, rival.call))
    times = in_turns(steps, rounds)
    return {rival.name: (times[f"{rival.name}/f"], times[f"{rival.name}/b"]) for rival in rivals}


def run_case(inputs: Inputs, layout: str, o: Options, recorder: Recorder, matmul: float) -> None:
    """Check and measure all rivals on one layout."""
    n = inputs.q.shape[2]
    (r, pairs), causal_pairs = make_labels(layout, n, "cuda"), n * (n + 1) // 2
    asked = tuple(o.attention or [""])
    plain = [x for x in causal_rivals(inputs.q, inputs.k, layout) if x.name.startswith(asked)]
    masked = [x for x in masked_rivals(inputs.q, inputs.k, r, layout) if x.name.startswith(asked)]
    unchecked = [x for x in plain if x.name not in inputs.causal_errors]
    inputs.causal_errors |= errors(inputs, unchecked, torch.arange(n, device="cuda"))
    found = inputs.causal_errors | errors(inputs, masked, r[0])
    counted = [x for x in (*plain, *masked) if max(found[x.name]) < TOLERANCE]
    for rival in (*plain, *masked):
        if rival not in counted:
            print(f"NOT COUNTED: {rival.name} on {layout} {n}: errors {found[rival.name]}", flush=True)
    times = measure(inputs, counted, o.rounds if n <= MAIN else 2)
    work = 4 * o.dim * o.heads / 1e9
    rates = {}
    for rival in counted:
        forward, backward = times[rival.name]
        seen = causal_pairs if rival.causal else pairs
        rates[rival.name] = work * seen / forward, 2.5 * work * seen / backward
    for rival in counted:
        row: dict[str, Any] = {"tokens": n, "layout": layout, "attention": rival.name}
        row |= {"heads": o.heads, "groups": o.groups, "dim": o.dim, "visible": pairs / causal_pairs}
        (row["fwd_ms"], row["bwd_ms"]), rate = times[rival.name], rates[rival.name]
        row["fwd_tflops"], row["bwd_tflops"] = rate
        for name, other in OVER.items():
            if other in rates:
                row |= {f"{k}_over_{name}": x / y for k, x, y in zip(("fwd", "bwd"), rate, rates[other], strict=True)}
        if (other := OVER["cudnn"]) in times:
            pairs_of_times = zip(("fwd", "bwd"), times[other], times[rival.name], strict=True)
            row |= {f"{k}_speedup": theirs / mine for k, theirs, mine in pairs_of_times}
        row |= {"fwd_of_datasheet": rate[0] / DATASHEET, "bwd_of_datasheet": rate[1] / DATASHEET}
        row |= {"fwd_of_matmul": rate[0] / matmul, "bwd_of_matmul": rate[1] / matmul}
        row["out_error"], row["grad_error"] = found[rival.name]
        recorder.add(**row)


def preparation_times(inputs: Inputs) -> dict[str, float]:
    """Times in us of what is done once per microbatch of the realistic layout."""
    n, case = inputs.q.shape[2], case_of(inputs.q)
    r = make_r("realistic", n, "cuda")
    graph = torch.cuda.CUDAGraph()
    tile_lists(r)
    with torch.cuda.graph(graph):
        tile_lists(r)
    functions: dict[str, Callable[[], Any]] = {"tile lists, graph replay": graph.replay}
    if flash4.flash4_problem(case) is None:
        functions["flash4 plan from Python"] = lambda: flash4.flash4_plan(AttentionLayout(r), case).backward
    if n <= MAIN:
        functions["create_block_mask, compiled"] = block_mask_maker(r)
    steps = {name: Step.of(function, calls=10) for name, function in functions.items()}
    return {name: 1e3 * time for name, time in in_turns(steps, 2).items()}


def main() -> None:
    """Run all cases."""
    o = parse_options(Options)
    warnings.filterwarnings("ignore", category=UserWarning)
    torch._functorch.config.donated_buffer = False  # backward runs repeatedly on one graph
    recorder = Recorder("attention", o.output, o.commit, key=KEY)
    matmul = matmul_rate()
    print(f"bfloat16 matmul {matmul:.0f} TFLOP/s, datasheet {DATASHEET:.0f}", flush=True)
    for n in o.lengths:
        inputs = Inputs(n, o.heads, o.groups, o.dim)
        for layout in o.cases if SHORT < n <= MAIN else ["realistic"]:
            run_case(inputs, layout, o, recorder, matmul)
        for name, value in (preparation_times(inputs) if o.preparation else {}).items():
            recorder.add(tokens=n, layout="realistic", attention=name, prepare_us=value)
        recorder.table(NOTE)
        del inputs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_tool(main)
