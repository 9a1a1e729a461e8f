"""Writes the table and the plot of the engine beside vLLM from the recorded figures.

    python -m benchmarks.report_engine

Reads benchmarks/results/engine_h200.json, which has the figures of one call on one machine, and writes the .md and the
.png beside it. Where the rival's figures come from another call, the table says so and gives no ratio.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_multiverse.cli import run_tool
from megatron_multiverse.files import save_figure

RESULTS = Path(__file__).parent / "results"
TEXT = """# Decoding beside vLLM, one H200

Random weights, bf16, 1,024 tokens of prompt, 128 new ones, greedy; median milliseconds from answer to answer, all that
a user waits for included. vLLM {vllm} with its defaults (engine in its own process, asynchronous scheduling,
FlashAttention 3, full CUDA graphs), same machine, same call. In brackets all runs. The copy bound is the time in which
a plain copy on this GPU moves as many bytes as a step must read.

| Model | Batch | Ours | Ours / copy bound | vLLM | Ours / vLLM |
|---|---|---|---|---|---|
{rows}

![milliseconds per step](engine_h200.png)

Fork of {paths} paths of {tokens} tokens after a prefix of {prefix:,}, 7B: {step:.2f} ms per step, {fork_ratio:.2f} of
the {rival:.2f} ms of vLLM's {paths} requests over its prefix cache. The whole block (fork, paths, join, 64 tokens of
conclusion) took {block:.2f} s once the graphs were captured ({first:.2f} s with that), path after path {serial:.1f} s:
{speedup:.1f} times as fast. vLLM's {paths} branches alone, without a join, took {rival_wall:.2f} s; {tokens_all:,}
tokens in one request {rival_serial:.1f} s.

Time to the first token of a prompt, 7B: {prompts} ({prompt_date}, commit {prompt_commit}:
`{prompt_command}`). vLLM's, measured apart, were 36 and 442 ms.

{date}, commit {commit}, torch {torch}, Triton {triton}: `{command}`
"""


def table_row(case: dict[str, Any]) -> str:
    """One line of the table."""
    ours = f"{case['ms_per_step']:.2f} {case['runs_ms']}"
    rival, runs = case.get("vllm_ms_per_step"), case.get("vllm_runs_ms")
    if rival is not None:
        shown, ratio = f"{rival:.2f} {runs}", f"{case['ms_per_step'] / rival:.2f}"
        best = case["ms_per_step"] / min(runs or [rival])
        ratio += f" (its best run {best:.2f})"
    else:
        other = case.get("vllm_ms_per_step_of_another_run")
        shown, ratio = ("not measured" if other is None else f"{other:.2f} in another call"), ""
    return f"| {case['model']} | {case['batch']} | {ours} | {case['times_copy_bound']:.2f} | {shown} | {ratio} |"


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Bars of milliseconds per step, ours beside the rival's of the same call."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for axis, model in zip(axes, ("qwen2.5-7b", "qwen2.5-1.5b"), strict=True):
        mine = [case for case in cases if case["model"] == model]
        places = range(len(mine))
        ours = axis.bar([x - 0.2 for x in places], [case["ms_per_step"] for case in mine], 0.38, label="ours")
        axis.bar_label(ours, fmt="%.2f", fontsize=8)
        for key, label, style in (
            ("vllm_ms_per_step", "vLLM, same call", {}),
            ("vllm_ms_per_step_of_another_run", "vLLM, another call", {"hatch": "//", "fill": False}),
        ):
            there = [(x + 0.2, case[key]) for x, case in zip(places, mine, strict=True) if case.get(key)]
            if there:
                bars = axis.bar(*zip(*there, strict=True), 0.38, label=label, **style)
                axis.bar_label(bars, fmt="%.2f", fontsize=8)
        axis.set_xticks(list(places), [str(case["batch"]) for case in mine])
        axis.set_xlabel("requests at once")
        axis.set_ylabel("ms per step")
        axis.set_title(model, fontsize=10)
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=110)


def main() -> None:
    """Write both files."""
    data = json.loads((RESULTS / "engine_h200.json").read_text(encoding="utf-8"))
    fork = data["fork"]
    rival = fork["vllm"]["fork_8_requests_prefix_cached"]
    block = min(fork["block_seconds_runs"])
    text = TEXT.format(
        **data["environment"],
        rows="\n".join(map(table_row, data["decode"])),
        paths=fork["paths"],
        tokens=fork["tokens"],
        tokens_all=fork["paths"] * fork["tokens"],
        prefix=fork["prefix"],
        step=fork["ms_per_step"],
        rival=rival["step_ms"],
        fork_ratio=fork["ms_per_step"] / rival["step_ms"],
        block=block,
        first=max(fork["block_seconds_runs"]),
        serial=fork["serial_seconds"],
        speedup=fork["serial_seconds"] / block,
        rival_wall=rival["wall_s"],
        rival_serial=fork["vllm"]["serial_4096_prefix_cached"]["wall_s"],
        prompts=", ".join(f"{case['tokens']:,} tokens {case['ms_to_first_token']:.0f} ms" for case in data["prompt"]),
        prompt_date=data["prompt"][0]["date"],
        prompt_commit=data["prompt"][0]["commit"],
        prompt_command=data["prompt"][0]["command"],
    )
    (RESULTS / "engine_h200.md").write_text(text, encoding="utf-8")
    draw(data["decode"], RESULTS / "engine_h200.png")
    print(f"written: {RESULTS / 'engine_h200.md'} and .png")


if __name__ == "__main__":
    run_tool(main)
