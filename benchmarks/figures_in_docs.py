"""The figures that README.md, docs/*.md and the quickstart quote, worded anew from the committed results.

    python -m benchmarks.figures_in_docs

names each statement that its document does not make in these words, and ends with status 1; a test does the same. After
new results, copy the new words. Each function below belongs to one document. Tables that are quoted whole are made
row by row. The tables of examples/paper_in_miniature come from its own paper_report.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report_blocks import ideal_speedup
from benchmarks.report_training import LENGTHS, recomputed, two_gpus
from megatron_multiverse.cli import run_tool
from megatron_multiverse.model.families import preset

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
LINK = re.compile(r"\]\([./]*(benchmarks/[\w/.]*results/[\w.]+)\.(?:json|jsonl|md)\)")
ONLY_LINKED = {
    ("docs/data.md", "benchmarks/results/preprocess_cpu"),
    ("docs/engine.md", "benchmarks/results/host_step_cpu"),
}
"""Documents, and results that they name without quoting a figure."""


def results(name: str) -> Any:
    """The content of results: an object, or a list of them where the file has one for each line.

    Args:
        name: below benchmarks/, without suffix.
    """
    file = BENCHMARKS / f"{name}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    return [json.loads(line) for line in file.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]


def readme() -> Iterator[str]:
    """README.md."""
    fork = results("results/engine_h200")["fork"]
    speedup = fork["serial_seconds"] / min(fork["block_seconds_runs"])
    yield f"a block of {fork['paths']} paths ends {speedup:.1f} times as soon as the same paths one by one"
    alone = results("results/engine_tp2_h200")["decode"][0]
    yield f"[{alone['speedup']:.1f} times as fast](benchmarks/results/engine_tp2_h200.json)"
    (theirs,) = (
        row["time_beside_ours"]
        for row in results("results/training_beside_transformers_h200")
        if (row["model"], row["case"], row["tokens"]) == ("qwen2.5-7b, 4 layers", "packed", 32768)
        and row["runner"].startswith("transformers")
    )
    yield f"[{theirs:.1f} times as fast](benchmarks/results/training_beside_transformers_h200.md)"
    yield f"[{_beside_fsdp():.1f} times as fast](benchmarks/results/training_layouts_h200.md)"


def curation() -> Iterator[str]:
    """docs/curation.md."""
    found = results("results/curation_faults")
    live, batch = found["live"], found["batch"]
    assert not live["left"] + batch["left"] + live["delivered_twice"] + batch["delivered_twice"]
    yield (
        f"runs {found['samples']} samples against a local server that answers {100 * found['rate_per_request']:.0f} % "
        f"of requests with each of {len(live['faults'])} faults ({len(batch['faults'])} in batches). All "
        f"{found['samples']} ended"
    )
    found = results("results/curation_kills")
    live, batch = found["live"], found["batch"]
    assert live["all_rows_as_without_kills"] and batch["all_rows_as_without_kills"]
    assert not sum(run["answered_twice"] for run in batch["runs"])
    twice = sum(run["answered_twice"] for run in live["runs"])
    yield f"kills runs of {found['samples_per_run']} samples"
    yield f"{live['kills']} kills live and {batch['kills']} with batches, in {len(live['runs'] + batch['runs'])} runs"
    yield (
        f"live {twice} answers were asked for again because they had been under way, "
        f"{twice / live['kills']:.0f} for a kill"
    )

    runs = results("results/curation_throughput")["runs"]
    spans = []
    for machine, many in (("2 cores", (2, 4, 8, 16)), ("12 of 32 cores", (4, 8, 16, 32))):
        for slots in many:
            found = [run for run in runs if (run["machine"], run["concurrency"]) == (machine, slots)]
            shares = [100 * run["busy_share_while_work_is_left"] for run in found]
            ends = dict.fromkeys(f"{share:.0f}" for share in (min(shares), max(shares)))
            spans.append(f"{' to '.join(ends)} % with {slots}")
    yield ", ".join(spans[:4])
    yield ", ".join(spans[4:])
    peak = max(run["peak_rss_mib_of_all_processes"] for run in runs if run["workers"] == 4)
    yield f"at most {peak} MiB in all processes together"
    most = max(run["answers"] / run["seconds"] for run in runs)
    yield f"one process asks for at most {most:.0f} answers a second"


def checkpoints() -> Iterator[str]:
    """docs/checkpoints.md."""
    found = results("results/convert_cpu")
    there, back = found["hf_to_mcore"], found["mcore_to_hf"]
    yield f"({found['gigabytes']:.0f} GB) takes {there['seconds']} s to megatron-core and {back['seconds']} s back"
    yield f"{there['ratio_to_copy']:.2f} and {back['ratio_to_copy']:.2f} of the speed of a plain copy"


def engine() -> Iterator[str]:
    """docs/engine.md."""
    soak = results("results/engine_soak_h200")
    assert soak["missing_pages"] == 0 and soak["logprob_off"] < soak["tolerance"]
    yield f"{soak['answers']:,} answers, {soak['checked_tokens']:,} tokens checked"
    bf16, fp8 = (results("results/engine_fp8_h200")[name]["rows"] for name in ("decode", "fp8"))
    yield (
        f"takes {fp8[0]['ms_per_step']:.2f} ms at batch 1 and {fp8[-1]['ms_per_step']:.2f} at 32, in bf16 "
        f"{bf16[0]['ms_per_step']:.2f} and {bf16[2]['ms_per_step']:.2f}"
    )
    layer = results("kernels/results/fp8_products_h200")
    faster = [_sum_of(layer, "widened_us", n) / _sum_of(layer, "scaled_mm_us", n) for n in (48, 128, 2048)]
    yield (
        f"{faster[0]:.1f} times as fast as widening the weights in each call at 48 rows, {faster[1]:.1f} times at "
        f"128 and {faster[2]:.1f} times at 2,048"
    )
    many = results("results/engine_fp8_h200")["fp8_many_rows"]["rows"][0]
    (plain,) = (
        row["ms_per_step"]
        for row in results("results/engine_h200")["decode"]
        if (row["model"], row["batch"]) == ("qwen2.5-7b", 128)
    )
    yield (
        f"at batch 128 a step takes {many['ms_per_step']:.2f} ms ({many['tokens_per_second']:,.0f} tokens/s), with "
        f"bf16 weights [{plain:.2f}](../benchmarks/results/engine_h200.json)"
    )
    blocks = results("results/engine_blocks_h200")
    rows, before = blocks["rows"], blocks["before"]["rows"]
    shares = {
        n: [row["speedup_per_parallel"] for row in rows if row.get("batch") == n and row.get("branches")]
        for n in (1, 8, 32)
    }
    yield (
        f"{min(shares[1]):.2f} to {max(shares[1]):.2f} of num_parallel at batch 1, {max(shares[8]):.2f} down to "
        f"{min(shares[8]):.2f} at 8 and {max(shares[32]):.2f} down to {min(shares[32]):.2f} at 32"
    )
    yield "take {:.0f} us for 48 rows, {:.0f} for 128 and {:.0f} for 256".format(
        *(_sum_of(layer, "bf16_us", n) for n in (48, 128, 256))
    )
    whole, shared = (
        next(row["seconds"] for row in found if row["case"] == "speedup, batch 8, num_parallel 2")
        for found in (rows, before)
    )
    yield f"took {whole:.3f} s with num_parallel 2 instead of {shared:.3f}"
    eight, many = (_ideal_share(batch) for batch in (8, 32))
    yield f"would keep {eight} at batch 8 and {many} at 32"
    held = results("results/engine_held_steps_h200")
    more = [min(row["held"]) - min(row["ahead"]) for row in held["decode"]["rows"]]
    waits = [min(row["in_turn"]) - min(row["ahead"]) for row in held["decode"]["rows"]]
    yield (
        f"Qwen2.5-7B takes {more[0]:.2f} ms more at batch 1 and at most {max(more[1:]):.2f} at 8 and 32, a step in "
        f"turn {min(waits):.1f} to {max(waits):.1f} ms more"
    )
    link = "(../benchmarks/results/engine_held_steps_h200.json)"
    joints = [[row for row in found if "fork_and_join_ms" in row] for found in (before, rows)]
    yield "took {:.1f} ms with overlap and {:.1f} in turn".format(*(row["fork_and_join_ms"] for row in joints[0]))
    joint, in_turn = joints[1]
    yield (
        f"They take {joint['fork_and_join_ms']:.1f} ms with overlap, {joint['in_steps']:.2f} steps, in three runs "
        f"between {min(joint['runs_ms']):.1f} and {max(joint['runs_ms']):.1f} ms, and "
        f"{in_turn['fork_and_join_ms']:.1f} in turn, {in_turn['in_steps']:.2f} steps"
    )
    apart, once = (held["fork_and_join"][name] for name in ("held", "alike_once"))
    yield (
        f"took [{once['fork_and_join_ms']:.1f} ms]{link}, and {apart['fork_and_join_ms']:.1f} until what the paths "
        "begin with alike was computed once"
    )
    found = results("results/fp8_logits_cpu")
    right = found["right_answers"]["fp8"] * found["problems"]
    yield (
        f"model logits move by {100 * found['fp8']['relative']:.1f} % of their spread, where bf16 moves them by "
        f"{100 * found['bf16']['relative']:.1f} %, and {right:.0f} of {found['problems']} held-out problems stay right"
    )
    fuzz = results("results/fuzz_cpu")
    yield f"{fuzz['distinct_trees']:,} different trees and {fuzz['soup_engines']:,} engines of tag soup"
    row = next(row for row in results("results/small_sums_h200") if row["rows"] == 1 and row["hidden_size"] == 3584)
    yield f"{row['sum_norm_us']:.1f} us for one row of Qwen2.5-7B on two H200"
    torch_us, nccl_us = row["symmetric_memory_us"], row["nccl_us"]
    yield f"symmetric memory up to 512 KiB ({torch_us:.1f} us), and larger ones NCCL ({nccl_us:.1f} us"
    alone = results("results/engine_tp2_h200")["decode"][0]
    yield (
        f"Qwen2.5-7B takes {alone['tp2_ms']:.2f} ms a step on two H200 and {alone['one_gpu_ms']:.2f} on one, with sum "
        f"and norm apart {alone['tp2_with_sum_and_norm_apart_ms']:.2f}"
    )
    mixed = results("load/results/load_h200_7b")["traces"]["mixed"]
    never, always, ours = (mixed[policy]["summaries"] for policy in ("never fork", "always fork", "by step time"))

    def times(name: str, others: dict[str, Any]) -> list[float]:
        """Smallest and largest of ours over theirs, seed by seed."""
        ratios = [ours[seed][name] / others[seed][name] for seed in ours]
        return [min(ratios), max(ratios)]

    goodput = "goodput_tokens_per_second"
    low, high = times(goodput, never)
    yield f"three seeds give {low:.2f} to {high:.2f} times the tokens of never forking within 50 ms of each other"
    low, high = times(goodput, always)
    yield f"{low:.1f} to {high:.1f} times those of always"
    yield f"at most {max(times('serial_gap_p99_ms', never)):.2f} times that of never"


def _sum_of(rows: list[dict[str, Any]], name: str, count: int) -> float:
    """Of all products with so many rows."""
    total: float = sum(row[name] for row in rows if row["rows"] == count)
    return total


def _ideal_share(batch: int) -> str:
    """What would be left of num_parallel at this batch if only bytes counted, over all cases that fork."""
    found = results("results/engine_blocks_h200")
    shape, context = preset(found["environment"]["model"]), int(found["environment"]["context"].replace(",", ""))
    rows = [row for row in found["rows"] if row.get("batch") == batch and row.get("branches")]
    shares = [ideal_speedup(row, shape, context) / row["num_parallel"] for row in rows]
    return f"{min(shares):.2f} to {max(shares):.2f}"


def layers() -> Iterator[str]:
    """docs/layers.md: its table of one layer beside megatron-core's stock one."""
    cases = [("bf16", "bf16, megatron-core 0.16.1", "0.16.1"), ("bf16", "bf16, megatron-core 0.19.2", "0.19.2")]
    cases += [
        (mode, mode.replace("fp8", "FP8"), "0.16.1")
        for mode in ("bf16, full recompute", "fp8 tensorwise", "fp8 blockwise")
    ]
    for mode, title, version in cases:
        rows = [row for row in results(f"kernels/results/layer_mcore_{version}_h200") if row["mode"] == mode]
        stock = min((row for row in rows if row["layer"].startswith("stock")), key=lambda row: row["ms"])
        (ours,) = (row for row in rows if row["layer"].startswith("ours") and row["layout"] == "realistic")
        yield (
            f"| {title} | {_rounded(stock['ms'], 1)} ms | {_rounded(ours['ms'], 1)} ms | {ours['time_ratio']:.2f} | "
            f"+{100 * (ours['memory_ratio'] - 1):.1f} % |"
        )


def training() -> Iterator[str]:
    """docs/training.md: its tables of shares of the mask, of layouts of two GPUs, of rivals and of FP8."""
    for name, column in (("cpu", "area_over_mean"), ("h200", "time_over_mean")):
        rows = results(f"results/training_balance_{name}")
        for case in ("packed", "wide", "deep", "realistic"):
            cells = [_rounded(row[column], 3) for row in rows if row["case"] == case]
            yield f"| {' | '.join(cells)} |"
    yield from _training_layouts()
    yield from _training_beside_others()
    yield from beside_fsdp_rows()
    yield from _training_fp8()
    yield from _checkpoints()


def _checkpoints() -> Iterator[str]:
    """What a checkpoint holds up, waited for and written beside the training."""
    found = results("results/checkpoint_cpu")
    yield f"{found['parameters'] / 1e6:.0f} million parameters ({found['gigabytes']:.2f} GB a checkpoint)"
    for name in ("wait_s", "next_step_s"):
        for engine in ("one_process", "megatron"):
            beside, waiting = (_rounded(found[f"{engine}_{way}"][name], 1) for way in ("beside", "waiting"))
            yield f"{beside} s instead of {waiting} s"


def _training_fp8() -> Iterator[str]:
    """Two tables: what FP8 saves of a step, and its loss beside the noise of bf16."""
    for row in results("results/training_fp8_h200"):
        mean, largest = (f"{100 * row[f'{name}_distance']:.1f} %" for name in ("mean", "largest"))
        if row["rows"] == "1 x 8192 packed" and row["way"] != "bf16":
            yield f"| {row['way'].replace('fp8', 'FP8')} | {row['last_loss']:.3f} | {mean} | {largest} |"
        elif row["way"].startswith("fp8"):
            yield f"| {row['way'].replace('fp8', 'FP8')} | {row['time_beside_first']:.2f} |"


def _training_layouts() -> Iterator[str]:
    """Rows of the table of layouts, and of longer rows beside it."""
    titles = {
        "DP2": "DP2, distributed optimizer",
        "TP2+SP": "TP2 + SP",
        "CP2 a2a": "CP2, all-to-all",
        "CP2 all_gather": "CP2, all-gather",
        "PP2 interleaved": "PP2, interleaved",
        "ZeRO-3 DP2": "ZeRO 3, DP2",
        "ZeRO-3 CP2": "ZeRO 3, CP2",
    }
    every = [
        row
        for row in results("results/training_layouts_h200")
        if row["gpus"] == 2 and row["model"] == "qwen2.5-7b, 4 layers"
    ]
    for row in (row for row in every if row["rows"] == "2 x 65536 packed"):
        yield f"{row['tokens_per_s_per_gpu']:,.0f}"
    rows = [row for row in every if row["rows"] == "4 x 32768 packed"]
    for row in sorted(rows, key=lambda row: -row["tokens_per_s_per_gpu"]):
        title = titles.get(row["layout"], row["layout"])
        yield f"| {title} | {row['tokens_per_s_per_gpu']:,.0f} | {row['mfu_visible']:.2f} | {row['peak_gib']:.1f} |"
    yield f"differ by {_short(max(row['loss_difference'] for row in rows), 0)} of their value at most"


def beside_fsdp_rows() -> Iterator[str]:
    """docs/training.md: half of a model on two GPUs, fastest first for each length of rows."""
    rows = two_gpus(results("results/training_layouts_h200"))
    for length in LENGTHS:
        of_length = [row for row in rows if f"x {length} " in row["rows"] and "result" not in row]
        for row in sorted(of_length, key=lambda row: -row["tokens_per_s_per_gpu"]):
            yield (
                f"| {length:,} | {row['layout']} | {recomputed(row)} | {row['tokens_per_s_per_gpu']:,.0f} | "
                f"{row['mfu_visible']:.2f} | {row['peak_gib']:.1f} |"
            )
    yield f"is {_beside_fsdp():.1f} times as fast as transformers under FSDP2 at 32K"
    one, two = (
        next(row for row in results("results/training_layouts_h200") if row["gpus"] == gpus and "16384" in row["model"])
        for gpus in (1, 2)
    )
    yield f"CP2 takes {two['s_per_step']:.3f} s a step and one GPU {one['s_per_step']:.3f} s"
    yield f"two GPUs are {one['s_per_step'] / two['s_per_step']:.2f} times as fast as one"


def _beside_fsdp() -> float:
    """How many times as fast as transformers under FSDP2 the fastest layout of two GPUs is at 32K tokens."""
    rows = [row for row in two_gpus(results("results/training_layouts_h200")) if "x 32768 " in row["rows"]]
    ours, theirs = (
        max(row["tokens_per_s_per_gpu"] for row in rows if ("transformers" in row["layout"]) == is_theirs)
        for is_theirs in (False, True)
    )
    return float(ours / theirs)


def _training_beside_others() -> Iterator[str]:
    """The table of what others take, longer rows last, and of one wide row."""
    rows = results("results/training_beside_transformers_h200")
    four = [row for row in rows if row["model"] == "qwen2.5-7b, 4 layers"]
    runs = {(row["case"], row["tokens"], row["runner"]): row for row in four}
    for tokens, times in ((8192, " times as long"), (16384, ""), (32768, "")):
        ours, theirs, causal = (
            runs["packed", tokens, name]
            for name in ("ours", "transformers, dense mask, checkpointing", "ours with TE causal attention")
        )
        yield (
            f"| {tokens:,} | {ours['tokens_per_s']:,.0f} | {theirs['time_beside_ours']:.2f}{times} | "
            f"{causal['time_beside_ours']:.2f} | {ours['peak_gib']:.1f}, {theirs['peak_gib']:.1f} | "
            f"{100 * ours['scan_and_data_share']:.1f} % |"
        )
    wide = runs["wide", 16384, "ours with TE causal attention"]
    yield f"On one wide row of 16,384 tokens plain causal attention takes {wide['time_beside_ours']:.2f} times as long"
    ten = {(row["tokens"], row["runner"]): row for row in rows if row["model"] == "qwen2.5-7b, 10 layers"}
    ours, at_once = ten[16384, "ours"], ten[16384, "ours, loss of all tokens at once"]
    theirs = ten[16384, "transformers, dense mask, checkpointing"]
    yield (
        f"at 16,384 tokens: {ours['tokens_per_s']:,.0f} tokens/s, {theirs['time_beside_ours']:.1f} times as many as "
        "theirs"
    )
    yield f"scan and loader take {100 * ours['scan_and_data_share']:.1f} % of a step"
    yield (
        f"takes {at_once['s_per_step'] / ours['s_per_step']:.3f} times as long and "
        f"{at_once['peak_gib'] - ours['peak_gib']:.1f} GiB more"
    )
    yield from _memory_with_recompute(ten)
    peaks = [f"{runs['packed', tokens, 'ours, full recompute']['peak_gib']:.1f}" for tokens in (8192, 16384, 32768)]
    yield f"all layers recomputed took {peaks[0]}, {peaks[1]} and {peaks[2]} GiB at 8,192, 16,384 and 32,768 tokens"


def _memory_with_recompute(runs: dict[tuple[int, str], dict[str, Any]]) -> Iterator[str]:
    """The table of ours without and with recompute and of theirs; runs by tokens and runner."""
    names = ("ours", "ours, full recompute", "transformers, dense mask, checkpointing")
    _, again, theirs = (runs[16384, name] for name in names)
    assert again["peak_gib"] < theirs["peak_gib"]
    yield f"is still {theirs['s_per_step'] / again['s_per_step']:.1f} times as fast"
    for tokens in sorted({tokens for tokens, _ in runs}):
        cells = [
            f"{run['tokens_per_s']:,.0f} tokens/s, {run['peak_gib']:.1f} GiB" if run else "not measured"
            for run in (runs.get((tokens, name)) for name in names)
        ]
        yield f"| {tokens:,} | {' | '.join(cells)} |"


def serving() -> Iterator[str]:
    """docs/serving.md."""
    overhead = results("results/server_h200")["overhead"]
    one, many = (median(row["server_whole"]) / median(row["engine"]) for row in overhead["tokens_per_second"])
    first = {name: median(overhead["first_token_ms"][name]) for name in ("server", "engine")}
    yield f"tokens at {one:.3f} (batch 1) and {many:.3f} (32) of the engine's own rate"
    yield f"comes after {first['server']:.0f} ms, {first['engine']:.0f} of them the engine's"
    found = results("results/server_soak_cpu")
    assert found["ok"] and not found["hangs"] + found["num_wrong"] + found["pages_missing_in_the_end"]
    engine_killed, rank_killed = (
        found[name]["seconds_until_all_heard"] for name in ("engine_killed", "one_of_two_ranks_killed")
    )
    yield f"One run of {found['seconds'] / 60:.0f} minutes"
    yield (
        f"{found['requests']:,} requests, {found['kinds']['malformed']:,} of them malformed, "
        f"{found['answers_compared']:,} answers compared, {found['preemptions']} preemptions; no hang, no wrong "
        "status, no other answer, no page missing"
    )
    yield f"killed engine within {engine_killed + 0.05:.1f} s, of the killed rank within {rank_killed + 0.05:.1f} s"
    stalls = results("results/server_stalls_cpu")["stalls"]
    alone, disturbed = ([turn for turn in stalls["turns"] if turn["kind"] == kind] for kind in ("alone", "disturbed"))
    rate = sum(turn["disturbances"] for turn in disturbed) / (len(disturbed) * stalls["seconds"])
    before, after = (median(turn["p50_ms"] for turn in turns) for turns in (alone, disturbed))
    late_before, late_after = (median(turn["p99_ms"] for turn in turns) for turns in (alone, disturbed))
    yield f"on {stalls['cores']} cores some {round(rate, -1):.0f} disturbances a second"
    yield (
        f"median step from {before:.0f} to {after:.0f} ms, the 99th percentile from {late_before:.0f} to "
        f"{late_after:.0f} ms"
    )
    steps, longest = sum(turn["steps"] for turn in disturbed), max(turn["longest_ms"] for turn in disturbed)
    yield f"the longest of {steps:,} steps was {longest:.0f} ms"
    found = results("results/server_reprefill_cpu")["reprefill"]
    ours, theirs, moved = found["engine"], found["reprefill"], found["moved"]
    assert ours["right"] == theirs["right"] == 1
    later = moved["later paths"]
    yield f"largest move {max(moved[name]['largest'] for name in ('first paths', 'after the join')):.3f}"
    yield (
        f"move by {later['mean']:.2f} on average, and by {later['largest']:.1f} at most; "
        f"{100 * later['still_likeliest']:.1f} % of them stay the likeliest. All {found['problems']} answers are right"
    )
    yield (
        f"An answer takes {theirs['requests']} requests that read {theirs['prompt_tokens']:.0f} tokens of prompts in "
        f"all, where the engine reads {ours['prompt_tokens']:.0f}"
    )


def rl() -> Iterator[str]:
    """docs/rl.md."""
    toy = results("results/rl_toy_cpu")
    assert {name.rpartition("_")[0] for name in toy} == {"learns", "control"} and len(toy) == 6, "from three seeds"
    assert all(rewards[-1] > 0.99 for name, rewards in toy.items() if name.startswith("learns"))
    steps = [row for row in results("results/rl_quickstart_h200") if row["kind"] == "train"]
    models = results("results/rl_quickstart_h200_compared")["models"]
    before, after = models["runs/rl/sft/model"], models["runs/rl/seed_1/model"]

    def forks(family: str) -> list[float]:
        return [100 * of["by_family"][family]["forks"] for of in (before, after)]

    yield f"{len(steps)} steps of {steps[0]['answers']} answers, one seed"
    yield "fork in {1:.0f} % of held-out answers instead of {0:.0f} %".format(*forks("narrow"))
    yield "wide ones in {1:.0f} % instead of {0:.0f} %; they take".format(*forks("wide"))
    steps_less, time_less = after["net_speedup_steps"], after["net_speedup"]
    yield f"they take {steps_less:.2f} times fewer steps and {time_less:.2f} times less wall clock"
    yield f"and {100 * after['accuracy']:.0f} % instead of {100 * before['accuracy']:.0f} % are right"
    models = results("results/rl_quickstart_seeds_h200_compared")["models"]
    before, *seeds = models.values()
    trained = {row["seed"] for row in results("results/rl_quickstart_seeds_h200") if row["kind"] == "train"}
    assert len(seeds) == len(trained) == 3 and all(of["by_family"]["narrow"]["forks"] == 0 for of in seeds)
    clock, steps_less = ([of[name] for of in seeds] for name in ("net_speedup", "net_speedup_steps"))
    yield f"{min(clock):.2f} to {max(clock):.2f} times less wall clock per right answer"
    yield f"{min(steps_less):.2f} to {max(steps_less):.2f} times fewer steps; "
    yield f"{100 * min(of['accuracy'] for of in seeds):.0f} % are right instead of {100 * before['accuracy']:.0f} %"
    steps = [row for row in results("results/rl_quickstart_cpu") if row["kind"] == "train"]
    drawn = {
        family: [100 * row[name] for row in steps if (name := f"trigger_ratio/{family}") in row]
        for family in ("narrow", "wide")
    }
    yield f"fork in {drawn['narrow'][-1]:.0f} % of answers instead of {drawn['narrow'][0]:.0f} %"
    yield f"wide ones in {drawn['wide'][-1]:.0f} % instead of {drawn['wide'][0]:.0f} %"
    models = results("results/rl_quickstart_cpu_compared")["models"]
    before, after = models["before"], models["after"]
    yield f"take {after['net_speedup_steps']:.2f} times fewer steps per right answer"
    yield f"and {after['net_speedup']:.2f} times less wall clock"
    yield f"right are {100 * after['accuracy']:.0f} % instead of {100 * before['accuracy']:.0f} %"
    usual, rounded = results("results/rl_rounding_h200")["runs"]
    yield f"[{100 * rounded['ratio_far']:.2f} %](../benchmarks/results/rl_rounding_h200.json)"
    yield f"have such a ratio instead of {100 * usual['ratio_far']:.2f} %"
    first = [100 * run["first_step_ratio_far"] for run in (rounded, usual)]
    yield "in the first step {:.3f} % instead of {:.3f} %".format(*first)
    rows, tree = results("results/rl_shared_prefix_h200")
    yield f"[{tree['speedup']:.1f} times](../benchmarks/results/rl_shared_prefix_h200.md) as fast"
    yield f"it takes {tree['peak_gib']:.0f} GiB, where rows one after the other take {rows['peak_gib']:.0f}"
    (drawn,) = results("results/rl_rollouts_h200")
    yield f"[{drawn['tokens_per_s_drawing']:,.0f} tokens/s](../benchmarks/results/rl_rollouts_h200.md)"
    yield f"the bare engine's {drawn['tokens_per_s_bare']:,.0f}; with the hand-over"
    yield f"grades it is {drawn['whole_over_bare']:.2f} of that"


def quickstart() -> Iterator[str]:
    """examples/quickstart/README.md."""
    report = results("results/quickstart_cpu")
    modes = ("parallel", "sequential", "autoregressive")
    yield (
        f"packages installed: {report['total_seconds']:.0f} seconds, the first answer after "
        f"{report['first_answer_seconds']:.0f}."
    )
    right = [f"{100 * report[name]:.0f} %" for name in ("accuracy", "accuracy_sequential", "accuracy_autoregressive")]
    rows = {
        "right answers": right,
        "tokens per answer": [f"{report[f'tokens_per_answer_{mode}']:.0f}" for mode in modes],
        "decode steps per answer": [f"{report[f'decode_steps_per_answer_{mode}']:.0f}" for mode in modes],
        "seconds per answer, one at a time": [f"{report[f'seconds_per_answer_{mode}']:.2f}" for mode in modes],
        "seconds for all 100, batched": [f"{report[f'batch_seconds_{mode}']:.1f}" for mode in modes],
    }
    for name, cells in rows.items():
        yield f"| {name} | {' | '.join(cells)} |"
    (steps, clock), (plain_steps, plain_clock) = (
        [report[f"net_speedup_{unit}{rival}"] for unit in ("steps", "wall_clock")]
        for rival in ("", "_over_autoregressive")
    )
    yield f"num_parallel is {report['num_parallel']:.2f}."
    yield f"{steps:.2f} in steps and {clock:.2f} in wall clock over one branch at a time"
    yield f"and {plain_steps:.2f} and {plain_clock:.2f} over thinking without blocks"
    yield f"one teacher-forced forward pass by at most {_short(report['max_abs_logit_difference'], 1)}."
    assert report["accuracy_5_to_6_expressions"] == report["accuracy_depth_3"] == 0, "or say how many are right"


def miniature() -> Iterator[str]:
    """examples/paper_in_miniature/README.md, whose other tables are made by its paper_report.py."""
    trials = results("results/miniature_trials_h200")
    runs = trials["1600_steps"]
    columns = ("multiverse-0", "multiverse-1", "no-links", "fixed-labels", "no-position-gaps", "looks-back")
    for name in runs["multiverse-0"]["right"]:
        task, number = name.split("-")[0], name.split("-")[1]
        yield f"| {number} {task} | " + " | ".join(
            f"{100 * runs[run]['right'][name] / trials['problems']:.0f}" for run in columns
        )
    for name, run in trials["learning_rate"].items():
        yield f"| {name} | {run['loss']['240']:.3f} | {run['loss']['480']:.3f} |"
    run = results("../examples/paper_in_miniature/results/multiverse-0")
    yield f"{run['training_s'] + run['evaluation_s']:.0f} s as one of four on a GPU"
    found = results("results/miniature_lookup_h200")
    for text, loss in found["losses"].items():
        yield f"| {text} | " + " | ".join(f"{loss[step]:.4f}" for step in ("200", "300", "500", "700"))
    for number in (6, 8, 12):
        gaps = found["accuracy without gaps in labels"], {name: run["right"] for name, run in found["accuracy"].items()}
        seeds = ("multiverse-0", "multiverse-1")
        yield f"| {number} chains | " + " | ".join(
            ", ".join(f"{100 * runs[seed][f'chains-{number}'] / 32:.0f}" for seed in seeds) for runs in gaps
        )
    plain = results("../examples/paper_in_miniature/results/plain-0")
    yield f"last loss is {plain['loss']:.4f} instead of {found['accuracy']['plain-0']['loss']:.4f}"
    looks = results("results/miniature_qk_norm_h200")["runs"]
    tied, untied = looks["tied embeddings, no QK norm"], looks["untied embeddings, QK norm"]
    yield f"from {tied['loss']['1300']:.3f} to {untied['loss']['1300']:.3f}"


STATEMENTS: dict[str, Callable[[], Iterator[str]]] = {
    "README.md": readme,
    "docs/checkpoints.md": checkpoints,
    "docs/curation.md": curation,
    "docs/engine.md": engine,
    "docs/layers.md": layers,
    "docs/rl.md": rl,
    "docs/serving.md": serving,
    "docs/training.md": training,
    "examples/paper_in_miniature/README.md": miniature,
    "examples/quickstart/README.md": quickstart,
}


def _rounded(value: float, digits: int) -> str:
    """Rounded as one does by hand: results have four digits, and 98.35 as a float is a little less than that."""
    return str(Decimal(str(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def _short(value: float, digits: int) -> str:
    """3e-5, as documents write it, not 3e-05."""
    return re.sub(r"e-0", "e-", f"{value:.{digits}e}")


def missing(document: str, text: str) -> list[str]:
    """The statements from results that a document does not make; line breaks do not count.

    Args:
        document: a key of `STATEMENTS`.
        text: its content.
    """
    said = " ".join(text.split())
    return [statement for statement in STATEMENTS[document]() if " ".join(statement.split()) not in said]


def main() -> None:
    """Name what is missing."""
    lines = [f"{name}: {line}" for name in STATEMENTS for line in missing(name, (ROOT / name).read_text("utf-8"))]
    print("\n".join(lines))
    sys.exit("documents differ from the committed results: copy the lines above, or see why" if lines else 0)


if __name__ == "__main__":
    run_tool(main)
