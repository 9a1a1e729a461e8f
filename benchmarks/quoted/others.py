"""What README.md, docs/checkpoints.md and docs/curation.md quote from results."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.quoted import source
from benchmarks.quoted.training import beside_fsdp


def readme() -> Iterator[str]:
    """README.md."""
    fork = source.results("results/engine_h200")["fork"]
    speedup = fork["serial_seconds"] / min(fork["block_seconds_runs"])
    times = f"[{speedup:.1f} times](benchmarks/results/engine_h200.md)"
    yield f"a block of {fork['paths']} paths ends {times} as soon as the same paths one by one"
    runs = [run for run in source.results("results/beside_vllm_h200")["runs"] if run["part"] == "block"]
    ours, theirs = (median(run["seconds"] for run in runs if run["side"] == side) for side in ("ours", "vllm"))
    yield f"[{ours / theirs:.2f} of the time](benchmarks/results/beside_vllm_h200.json) of paths and join in vLLM"
    modes = source.results("../examples/paper_in_miniature/results/alone")["modes"]
    plain, parallel = (
        sum(row["seconds"] for row in modes[mode] if row["chains"] == 4) for mode in ("plain", "parallel")
    )
    yield f"answers in four paths {plain / parallel:.2f} times as soon as a plain one"
    alone = source.results("results/engine_tp2_h200")["decode"][0]
    yield f"[{alone['speedup']:.1f} times as fast](benchmarks/results/engine_tp2_h200.json)"
    (theirs,) = (
        row["time_beside_ours"]
        for row in source.results("results/training_beside_transformers_h200")
        if (row["model"], row["case"], row["tokens"]) == ("qwen2.5-7b, 10 layers", "packed", 32768)
        and row["runner"].startswith("transformers")
    )
    yield f"[{theirs:.1f} times as fast](benchmarks/results/training_beside_transformers_h200.md)"
    yield f"[{beside_fsdp():.1f} times as fast](benchmarks/results/training_layouts_h200.md)"


def curation() -> Iterator[str]:
    """docs/curation.md."""
    found = source.results("results/curation_faults")
    live, batch = found["live"], found["batch"]
    assert not live["left"] + batch["left"] + live["delivered_twice"] + batch["delivered_twice"]
    yield (
        f"runs {found['samples']} samples against a local server that answers {100 * found['rate_per_request']:.0f} % "
        f"of requests with each of {len(live['faults'])} faults ({len(batch['faults'])} in batches). All "
        f"{found['samples']} ended"
    )
    found = source.results("results/curation_kills")
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

    runs = source.results("results/curation_throughput")["runs"]
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
    found = source.results("results/convert_cpu")
    there, back = found["hf_to_mcore"], found["mcore_to_hf"]
    yield f"({found['gigabytes']:.0f} GB) takes {there['seconds']} s to megatron-core and {back['seconds']} s back"
    yield f"{there['ratio_to_copy']:.2f} and {back['ratio_to_copy']:.2f} of the speed of a plain copy"
