"""What tools/bench_engine.py prints of each case, and the row of figures that it writes of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from megatron_multiverse.inference.bench_blocks import fit_law


def report_steps(name: str, runs: Sequence[float], *, size: int, copy: float, rows: int) -> dict[str, Any]:
    """Print how long a step takes and return it as a row.

    Args:
        name: of the case.
        runs: seconds per step of each measurement; the median counts.
        size: bytes that the step reads at least.
        copy: bytes per second of a copy on the same device.
        rows: tokens that a step gives.
    """
    step = statistics.median(runs)
    row = {
        "case": name,
        "ms_per_step": step * 1e3,
        "runs_ms": [run * 1e3 for run in runs],
        "tokens_per_second": rows / step,
        "gigabytes": size / 1e9,
        "times_copy_bound": step * copy / size,
    }
    listed = " ".join(f"{run * 1e3:.2f}" for run in runs)
    print(
        f"{name:18} {step * 1e3:7.2f} ms/step [{listed}]  {rows / step:9.0f} tokens/s  {size / 1e9:6.2f} GB  "
        f"{row['times_copy_bound']:.2f} x copy bound",
        flush=True,
    )
    return row


def report_prompt(length: int, runs: Sequence[float]) -> dict[str, Any]:
    """Print the time to a first token and return it as a row; `runs` are the seconds of each measurement."""
    seconds = statistics.median(runs)
    listed = " ".join(f"{run * 1e3:.1f}" for run in runs)
    print(f"prompt {length:<11} {seconds * 1e3:7.1f} ms to the first token [{listed}]", flush=True)
    return {"case": f"prompt, {length} tokens", "ms": seconds * 1e3, "runs_ms": [run * 1e3 for run in runs]}


def report_fork(
    forks: Sequence[tuple[float, float]], serial: float, *, size: int, copy: float, branches: int
) -> dict[str, Any]:
    """Print the case of one block and return it as a row.

    Args:
        forks: (seconds per step within the paths, seconds of the block) of each measurement.
        serial: seconds of the block with one path after the other.
        size: bytes that a step within the paths reads at least.
        copy: bytes per second of a copy on the same device.
        branches: paths of the block.
    """
    blocks = [seconds for _, seconds in forks]
    row = report_steps("fork", [step for step, _ in forks], size=size, copy=copy, rows=branches)
    row |= {"block_seconds": statistics.median(blocks), "serial_seconds": serial}
    row["speedup"] = serial / row["block_seconds"]
    print(
        f"  whole block {row['block_seconds']:.3f} s {[round(b, 3) for b in blocks]}, path after path "
        f"{serial:.3f} s: {row['speedup']:.2f}x with {branches} paths",
        flush=True,
    )
    return row


def report_joint(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Print what fork and join cost, and return the median of the rows that `bench_blocks.joint` gave."""
    row = sorted(runs, key=lambda run: run["fork_and_join_ms"])[len(runs) // 2]
    row |= {"runs_ms": [run["fork_and_join_ms"] for run in runs]}
    print(
        f"{row['case']}, after {row['prefix']} tokens: {row['fork_and_join_ms']:.2f} ms, {row['in_steps']:.2f} of a "
        f"step of {row['ms_per_step']:.2f} ms; {row['more_steps']} more steps than tokens of the longest chain; copied "
        f"{row['copied_tokens']} tokens (at most {row['most_copied_tokens']}), fed again {row['fed_again_tokens']}",
        flush=True,
    )
    turns = (
        f"{kind} " + ", ".join(f"{part.removesuffix('_ms')} {ms:.2f}" for part, ms in figures.items())
        for kind, figures in row["turns"].items()
    )
    print(f"  ms of {'; '.join(turns)}", flush=True)
    return row


def report_speedup(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row of `bench_blocks.speedup`, and return it."""
    print(
        f"batch {row['batch']:<4} num_parallel {row['num_parallel']:.3f}: {row['seconds']:.3f} s, path after path "
        f"{row['serial_seconds']:.3f} s: {row['speedup']:.3f}x, {row['speedup_per_parallel']:.3f} of num_parallel, "
        f"{row['ms_per_token']:.3f} ms per token",
        flush=True,
    )
    return row


def report_law(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Print the law that the rows of `bench_blocks.speedup` at one batch follow, and return it as a row."""
    batch, (a, b) = rows[0]["batch"], fit_law(rows)
    print(f"batch {batch:<4} ms per token = {a:.2f} / num_parallel + {b:.2f}", flush=True)
    return {"case": f"law, batch {batch}", "batch": batch, "a": a, "b": b}
