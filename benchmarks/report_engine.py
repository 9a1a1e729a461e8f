"""Writes the table and the plot of the engine beside vLLM from the recorded figures.

    python -m benchmarks.report_engine

Reads what `benchmarks.beside_vllm` measured in one call on one machine (benchmarks/results/beside_vllm_h200.json), and
for a block path after path and the first token of a prompt engine_h200.json; writes engine_h200.md and .png.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from megatron_multiverse.cli import run_tool
from megatron_multiverse.files import save_figure
from megatron_multiverse.inference.bench import BenchConfig, step_bytes
from megatron_multiverse.model.families import preset

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "qwen2.5-7b": ("decode-7b", "ours", ("vllm",)),
    "qwen2.5-1.5b": ("decode", "ours small", ("vllm small", "vllm small earlier runner")),
}
"""Preset -> part of the measurement, our side, its sides."""
TEXT = """# Decoding beside vLLM, one H200

Random weights, bf16, 1,024 tokens of prompt, 128 new ones, greedy; median milliseconds from answer to answer, all that
a user waits for included. vLLM {vllm} with its defaults (engine in its own process, asynchronous scheduling,
FlashAttention 3, full CUDA graphs), for the 1.5B model with the faster of its two runners, whose runs differ by up to a
half; its best run may be the other's. Same machine, same call, in turn; in brackets the runs. The copy bound is the
time in which a plain copy on this GPU moves as many bytes as a step must read.

| Model | Batch | Ours | Ours / copy bound | vLLM | Ours / vLLM |
|---|---|---|---|---|---|
{rows}

![milliseconds per step](engine_h200.png)

{date}, commit {commit}, torch {torch}: `python -m benchmarks.beside_vllm`

Earlier (2026-11-28, commit ec4ac97 with c0773ed and 9e404a7), 7B: a block of {paths} paths of {tokens} tokens after a
prefix of {prefix:,} (fork, paths, join, 64 tokens of conclusion) took {block:.2f} s once the graphs were captured
({first:.2f} s with that), path after path {serial:.1f} s: {speedup:.1f} times as fast. vLLM took {rival_serial:.1f} s
for {tokens_all:,} tokens in one request. `python tools/bench_engine.py --model-preset qwen2.5-7b --parts fork`

Time to the first token of a prompt, 7B: {prompts} ({prompt_date}, commit {prompt_commit}:
`{prompt_command}`). vLLM's, measured apart, were 36 and 442 ms.
"""


def cases_of(beside: dict[str, Any]) -> list[dict[str, Any]]:
    """A case per model and batch: median milliseconds and all runs, ours and vLLM's, and ours in copy bounds."""
    found = []
    for model, (part, ours, theirs) in MODELS.items():
        runs = [run for run in beside["runs"] if run["part"] == part]
        config, shape = BenchConfig(model_preset=model), preset(model)
        for batch in sorted({run["case"]["batch"] for run in runs}):
            of = {
                side: [run["ms_per_step"] for run in runs if (run["side"], run["case"]["batch"]) == (side, batch)]
                for side in (ours, *theirs)
            }
            rival = min((of[side] for side in theirs), key=median)
            bound = step_bytes(shape, config, batch * config.context) / beside["engines"][ours]["copy_TB_per_second"]
            case = {"model": model, "batch": batch, "ms": median(of[ours]), "runs": of[ours]}
            case |= {
                "vllm_ms": median(rival),
                "vllm_runs": rival,
                "vllm_best": min(ms for side in theirs for ms in of[side]),
            }
            found.append(case | {"bounds": case["ms"] * 1e9 / bound})
    return found


def table_row(case: dict[str, Any]) -> str:
    """One line of the table."""
    ours, rival = case["ms"], case["vllm_ms"]
    return (
        f"| {case['model']} | {case['batch']} | {ours:.2f} {case['runs']} | {case['bounds']:.2f} | {rival:.2f} "
        f"{case['vllm_runs']} | {ours / rival:.2f} (its best run {ours / case['vllm_best']:.2f}) |"
    )


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Bars of milliseconds per step, ours beside the rival's of the same call."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for axis, model in zip(axes, MODELS, strict=True):
        mine = [case for case in cases if case["model"] == model]
        places = range(len(mine))
        for shift, key, label in ((-0.2, "ms", "ours"), (0.2, "vllm_ms", "vLLM")):
            bars = axis.bar([x + shift for x in places], [case[key] for case in mine], 0.38, label=label)
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
    data, beside = (
        json.loads((RESULTS / f"{name}_h200.json").read_text(encoding="utf-8")) for name in ("engine", "beside_vllm")
    )
    cases, fork = cases_of(beside), data["fork"]
    block = min(fork["block_seconds_runs"])
    text = TEXT.format(
        vllm=beside["engines"]["vllm"]["vllm"],
        torch=beside["engines"]["ours"]["torch"],
        date=beside["date"],
        commit=beside["commit"],
        rows="\n".join(map(table_row, cases)),
        paths=fork["paths"],
        tokens=fork["tokens"],
        tokens_all=fork["paths"] * fork["tokens"],
        prefix=fork["prefix"],
        block=block,
        first=max(fork["block_seconds_runs"]),
        serial=fork["serial_seconds"],
        speedup=fork["serial_seconds"] / block,
        rival_serial=fork["vllm"]["serial_4096_prefix_cached"]["wall_s"],
        prompts=", ".join(f"{case['tokens']:,} tokens {case['ms_to_first_token']:.0f} ms" for case in data["prompt"]),
        prompt_date=data["prompt"][0]["date"],
        prompt_commit=data["prompt"][0]["commit"],
        prompt_command=data["prompt"][0]["command"],
    )
    (RESULTS / "engine_h200.md").write_text(text, encoding="utf-8")
    draw(cases, RESULTS / "engine_h200.png")
    print(f"written: {RESULTS / 'engine_h200.md'} and .png")


if __name__ == "__main__":
    run_tool(main)
