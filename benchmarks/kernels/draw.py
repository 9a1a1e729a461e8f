"""Drawing tokens on one GPU: the kernel beside its plain version in torch, which sorts the vocabulary for the filters.

`ours` and `plain` draw the same tokens from the same noise. `greedy` draws without noise: the least that reading the
logits costs. `flashinfer` is its own way with other noise, where it is installed. Flat logits are those of random
weights; of peaked ones a few tokens have nearly all of the mass, as in a trained model. All are CUDA graphs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.record import Recorder
from benchmarks.kernels.timing import Step, captured, in_turns
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.kernels.sampling import Filters, draw, draw_reference, greedy

ASKED = {
    "temperature": (0, 1.0, 0.0),
    "top-p 0.95": (0, 0.95, 0.0),
    "top-k 20": (20, 1.0, 0.0),
    "top-k 20, top-p 0.8": (20, 0.8, 0.0),
    "min-p 0.05": (0, 1.0, 0.05),
}
"""top-k, top-p and min-p, all at temperature 0.6."""


@dataclass
class Options:
    """What to measure."""

    rows: tuple[int, ...] = (1, 8, 32, 128)
    """Rows of a step."""
    vocab: int = 151936
    """Of Qwen2.5."""
    calls: int = 8
    """Of a graph, each over logits and keys of its own."""
    rounds: int = 2
    """Turns of each way; the median of all calls counts."""
    output: str | None = None
    """Folder; default benchmarks/kernels/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


def main() -> None:
    """Run all cases."""
    o = parse_options(Options)
    recorder = Recorder("draw", o.output, o.commit, key=("rows", "logits", "asked"))
    for rows in o.rows:
        for kind in ("flat", "peaked"):
            logits = [some_logits(kind, rows, o.vocab, seed) for seed in range(o.calls)]
            for asked in ASKED:
                measure(recorder, o, kind, asked, logits)
    recorder.table("Microseconds to draw a token for each row, bfloat16 logits; see benchmarks/kernels/draw.py.")


def some_logits(kind: str, rows: int, vocab: int, seed: int) -> Tensor:
    """Logits bfloat16 [rows, vocab]."""
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(rows, vocab, device="cuda", generator=generator)
    if kind == "peaked":
        places = torch.randint(vocab, (rows, 20), device="cuda", generator=generator)
        logits.mul_(2).scatter_add_(1, places, 14 - 0.7 * torch.arange(20.0, device="cuda").expand(rows, -1))
    return logits.bfloat16()


def measure(recorder: Recorder, o: Options, kind: str, asked: str, logits: list[Tensor]) -> None:
    """Check one case, time all ways in turns, and record it."""
    rows = len(logits[0])
    keys, indices = torch.arange(rows, device="cuda") * 7919, torch.arange(rows, device="cuda")
    temperature = torch.full((rows,), 0.6, dtype=torch.float64, device="cuda")
    top_k, top_p, min_p = ASKED[asked]
    filters = Filters(
        torch.full_like(keys, top_k), torch.full_like(temperature, top_p), torch.full_like(temperature, min_p)
    )
    plain_filters = None if asked == "temperature" else filters
    ways: dict[str, Callable[[Tensor], object]] = {
        "ours": lambda x: draw(x, keys, indices, temperature, filters),
        "plain": lambda x: draw_reference(x, keys, indices, temperature, plain_filters),
        "greedy": greedy,
    }
    if importlib.util.find_spec("flashinfer") is not None and not min_p:
        ways["flashinfer"] = flashinfer_way(rows, top_k or o.vocab, top_p)
    differ = sum(
        int(
            (
                draw(x, keys, indices, temperature, filters)[0]
                != draw_reference(x, keys, indices, temperature, plain_filters)[0]
            ).sum()
        )
        for x in logits
    )
    steps = {name: Step.of(captured([partial(way, x) for x in logits]).replay) for name, way in ways.items()}
    times = in_turns(steps, o.rounds)
    row = {f"{name}_us": 1e3 * time / len(logits) for name, time in times.items()}
    recorder.add(rows=rows, logits=kind, asked=asked, **row, tokens_that_differ=differ, tokens=rows * len(logits))


def flashinfer_way(rows: int, top_k: int, top_p: float) -> Callable[[Tensor], Tensor]:
    """Temperature, then top-k and top-p, as its documentation has it."""
    from flashinfer import sampling

    ks = torch.full((rows,), top_k, dtype=torch.int32, device="cuda")
    ps = torch.full((rows,), top_p, device="cuda")

    def way(x: Tensor) -> Tensor:
        probabilities = sampling.softmax(x, 0.6)
        if top_p < 1 or top_k < x.shape[1]:
            return sampling.top_k_top_p_sampling_from_probs(probabilities, ks, ps, deterministic=True)
        return sampling.sampling_from_probs(probabilities, deterministic=True)

    return way


if __name__ == "__main__":
    run_tool(main)
