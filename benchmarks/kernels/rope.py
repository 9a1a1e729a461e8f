"""Our rotary kernels beside megatron-core's unfused rotation, TransformerEngine's fused ones and a plain copy of the
same bytes, on one GPU, in one run.

TransformerEngine's kernels take only the positions 0..s-1 and compute sines and cosines at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.record import Recorder
from benchmarks.kernels.timing import Step, in_turns
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.kernels.rope import (
    inverse_frequencies,
    rope_angles,
    rope_reference,
    rope_table,
    rotate_qkv_by_table,
)
from megatron_multiverse.kernels.rope.triton_qkv import split_and_rotate_triton
from megatron_multiverse.kernels.rope.triton_rotate import rotate_triton

TOLERANCE = 4e-3
"""Relative error in bfloat16 against float64."""


@dataclass
class Options:
    """What to measure."""

    tokens: int = 32768
    heads: int = 40
    groups: int = 8
    dim: int = 128
    """Width of a head. tokens, heads and groups are those of q and k."""
    transformer_engine: bool = True
    """Also measure TransformerEngine's kernels, if it is installed (importing it takes ten seconds)."""
    output: str | None = None
    """Folder; default benchmarks/kernels/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


@dataclass
class Case:
    """One way to rotate."""

    name: str
    function: Callable[[], Any]
    inputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    exact: list[Tensor]
    """Outputs and gradients in float64; none for a copy."""
    copied: str
    """The copy it is measured by."""


def main() -> None:
    """Run all cases."""
    o = parse_options(Options)
    recorder = Recorder("rope", o.output, o.commit, key=("case", "tokens", "heads", "groups", "dim"))
    cases = [*pair_cases(o), *qkv_cases(o)]
    measure(cases, recorder, o)
    recorder.table(
        "`q and k`: two tensors in, two out. `qkv`: the mixed projection in, q, k and v out (backward the reverse). "
        "TB/s count each element read once and written once; tables are extra. Share is that of the copy's bandwidth."
    )


def pair_cases(o: Options) -> list[Case]:
    """q and k as two tensors: a copy, unfused, ours, TransformerEngine's."""
    q, k, gq, gk = (draw(o.tokens, 1, n, o.dim, seed=i) for i, n in enumerate((o.heads, o.groups) * 2))
    q.requires_grad_(), k.requires_grad_()
    ids, inv_freq, in_order = positions(o)
    table, angles = rope_table(ids, inv_freq), rope_angles(ids, inv_freq)
    both = torch.cat((q, k), 2).detach()
    target = torch.empty_like(both)

    def exact(used: Tensor) -> list[Tensor]:
        rotated = [rope_reference(x.detach().double(), used.double()) for x in (q, k)]
        return rotated + [rope_reference(x.double(), -used.double()) for x in (gq, gk)]

    kind, tensors, grads = "q and k", (q, k), (gq, gk)
    cases = [
        Case("copy, q and k", lambda: target.copy_(both), (both,), (), [], kind),
        Case("megatron-core unfused, q and k", lambda: [rope_reference(x, angles) for x in tensors], tensors, grads,
             exact(angles), kind),
        Case("ours, q and k", lambda: rotate_triton(q, k, table), tensors, grads, exact(angles), kind),
    ]  # fmt: skip
    te = transformer_engine_rope() if o.transformer_engine else None
    if te is not None:
        ordered = rope_angles(in_order, inv_freq)
        call = te.apply_rotary_pos_emb
        cases.append(
            Case("TransformerEngine, q and k, in order",
                 lambda: [call(x, ordered, tensor_format="sbhd", fused=True) for x in tensors], tensors, grads,
                 exact(ordered), kind)
        )  # fmt: skip
    return cases


def qkv_cases(o: Options) -> list[Case]:
    """The mixed projection split and rotated: a copy, split and ours, ours in one, TransformerEngine's."""
    per_group = o.heads // o.groups
    widths = [per_group * o.dim, o.dim, o.dim]
    mixed = draw(o.tokens, 1, o.groups, sum(widths), seed=5).requires_grad_()
    grads = tuple(draw(o.tokens, 1, n, o.dim, seed=6 + i) for i, n in enumerate((o.heads, o.groups, o.groups)))
    ids, inv_freq, in_order = positions(o)
    table = rope_table(ids, inv_freq)
    source, target = mixed.detach(), torch.empty_like(mixed)

    def exact(used: Tensor) -> list[Tensor]:
        wide = mixed.detach().double().requires_grad_()
        out = rotate_qkv_by_table(wide, used.double())
        return [*(x.detach() for x in out), *torch.autograd.grad(out, wide, [x.double() for x in grads])]

    def split() -> tuple[Tensor, ...]:
        q, k, v = mixed.split(widths, dim=-1)
        return (*rotate_triton(q.reshape(o.tokens, 1, o.heads, o.dim), k, table), v)

    kind, tensors = "qkv", (mixed,)
    cases = [
        Case("copy, qkv", lambda: target.copy_(source), (source,), (), [], kind),
        Case("split, then ours for q and k", split, tensors, grads, exact(table), kind),
        Case("ours, qkv", lambda: split_and_rotate_triton(mixed, table), tensors, grads, exact(table), kind),
    ]
    te = transformer_engine_rope() if o.transformer_engine else None
    if te is not None:
        ordered = rope_angles(in_order, inv_freq)
        call = te.apply_fused_qkv_rotary_pos_emb
        cases.append(
            Case("TransformerEngine, qkv, in order", lambda: call(mixed, ordered, ordered, widths), tensors, grads,
                 exact(rope_table(in_order, inv_freq)), kind)
        )  # fmt: skip
    return cases


def error_of(case: Case) -> float:
    """Worst relative error of outputs and gradients against float64."""
    out = case.function()
    got = (*out, *torch.autograd.grad(out, case.inputs, case.grads))
    return max(float((x.detach().double() - y).norm() / y.norm()) for x, y in zip(got, case.exact, strict=True))


def measure(cases: list[Case], recorder: Recorder, o: Options) -> None:
    """Check all cases against float64, then time those that passed, in turns, and record them.

    Tensors are far larger than the L2 cache.
    """
    errors = {case.name: error_of(case) for case in cases if case.exact}
    counted = [case for case in cases if not case.exact or errors[case.name] < TOLERANCE]
    print(
        *(f"NOT COUNTED: {x.name}: error {errors[x.name]:.2e}\n" for x in cases if x not in counted), end="", flush=True
    )
    steps: dict[str, Step] = {}
    for case in counted:
        steps[f"{case.name}/f"] = Step(partial(forward, case), calls=4, after_wait=True)
        if case.exact:
            out = case.function()
            steps[f"{case.name}/b"] = Step(partial(backward, case, out), calls=4, after_wait=True)
    times = in_turns(steps, 3)
    for case in counted:
        moved, copy = 2 * sum(x.nbytes for x in case.inputs), times[f"copy, {case.copied}/f"]
        row: dict[str, Any] = {
            "case": case.name,
            "tokens": o.tokens,
            "heads": o.heads,
            "groups": o.groups,
            "dim": o.dim,
        }
        for name in ("fwd", "bwd") if case.exact else ("fwd",):
            time = times[f"{case.name}/{name[0]}"]
            row |= {f"{name}_us": 1e3 * time, f"{name}_tb_s": moved / time / 1e9, f"{name}_share": copy / time}
        recorder.add(**row, **({"error": errors[case.name]} if case.exact else {}))


@torch.no_grad()
def forward(case: Case, _: Any = None) -> None:
    """One rotation."""
    case.function()


def backward(case: Case, out: Any, _: Any = None) -> None:
    """Its gradients."""
    torch.autograd.grad(out, case.inputs, case.grads, retain_graph=True)


def draw(*shape: int, seed: int) -> Tensor:
    """Normal numbers on the GPU in bfloat16."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator).bfloat16()


def positions(o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Random position ids [1, tokens], the inverse frequencies, and the ids in order."""
    ids = torch.randint(0, o.tokens, (1, o.tokens), device="cuda")
    return ids, inverse_frequencies(o.dim, 1e6, "cuda", torch.float32), torch.arange(o.tokens, device="cuda")[None]


def transformer_engine_rope() -> Any:
    """TransformerEngine's module of rotary embeddings, or None if it is not installed."""
    try:
        from transformer_engine.pytorch.attention import rope
    except ImportError:
        return None
    return rope


if __name__ == "__main__":
    run_tool(main)
