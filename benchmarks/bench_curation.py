"""The curator under stress, against the local server of its tests: faults, kills and throughput.

    python -m benchmarks.bench_curation --part faults
    python -m benchmarks.bench_curation --part kills
    python -m benchmarks.bench_curation --part throughput --samples FOLDER

Prints one JSON object. The figures in docs/curation.md are from benchmarks/results/curation_*.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from benchmarks.curation_replay import ReplayServer, numbered
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.curation.config import CurateConfig
from megatron_multiverse.curation.trees import parse_think
from tests.unit.curation.anthropic_server import KEY, AnthropicServer, Faults
from tests.unit.curation.conftest import read_rows, write_chains
from tests.unit.curation.random_trees import trajectory
from tests.unit.curation.scripted import Script

ROOT = Path(__file__).parents[1]
LIVE_FAULTS = (
    "429", "429_after", "529", "500", "timeout", "drop", "cut_json", "html",
    "refusal", "max_tokens", "context_window", "wrong_structure",
)  # fmt: skip
BATCH_FAULTS = (
    "errored", "invalid", "expired", "canceled", "refusal", "max_tokens", "context_window", "wrong_structure"
)  # fmt: skip
ANSWER_S = 0.05
KILLED_CONCURRENCY = 4


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Stress the curator against a local server."""

    part: Literal["faults", "kills", "throughput"] = "faults"
    """faults: every fault of a provider at once. kills: kill -9 at random moments. throughput: are the slots busy?"""
    mode: Literal["both", "live", "batch"] = "both"
    """Live requests, batches, or one after the other; for faults and kills."""
    count: int = 0
    """Number of chains; 0 takes 200, 40 and 1,000."""
    samples: str = ""
    """Folder of real trajectories (*.xml) for the throughput; random ones without it."""
    concurrency: int = CurateConfig.concurrency
    """Requests at the same time, for the throughput."""
    workers: int = CurateConfig.workers
    """Processes that check answers, for the throughput."""
    kills: int = 20
    """How often a run is killed, at least."""
    seed: int = 0
    """Of the moments at which runs are killed."""
    fault_rate: float = 0.05
    """Share of requests that each fault hits; with at least three requests for a sample, about three times as many
    samples."""


def command(folder: Path, server: AnthropicServer | ReplayServer, *options: str) -> list[str]:
    words = [sys.executable, "tools/curate_data.py", "--input", str(folder / "chains.jsonl")]
    words += ["--output", str(folder / "out"), "--model", "claude-sonnet-5-5", "--base-url", server.url, "--yes"]
    words += ["--min-net-gain", "0", "--independence", "report", "--views", "0", "--poll-interval", "0.1"]
    return [*words, *options]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ANTHROPIC_API_KEY": KEY}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def modes(options: BenchOptions) -> tuple[str, ...]:
    return ("live", "batch") if options.mode == "both" else (options.mode,)


def bench_faults(options: BenchOptions, folder: Path) -> dict[str, Any]:
    scripts = [Script(trajectory(seed)) for seed in range(options.count or 200)]
    found: dict[str, Any] = {"samples": len(scripts), "rate_per_request": options.fault_rate}
    for name in modes(options):
        own = folder / name
        own.mkdir()
        write_chains(own / "chains.jsonl", scripts)
        live = dict.fromkeys(LIVE_FAULTS, options.fault_rate) if name == "live" else {}
        batch = dict.fromkeys(BATCH_FAULTS, options.fault_rate)
        with AnthropicServer(scripts, faults=Faults(live), batch_faults=batch) as server:
            started = time.monotonic()
            done = run(command(own, server, "--request-timeout", "8", *(["--batch"] if name == "batch" else [])))
            report = json.loads((own / "out" / "report.json").read_text())
            aside = read_rows(own / "out" / "set_aside.jsonl")
            found[name] = {
                "exit_code": done.returncode,
                "seconds": round(time.monotonic() - started, 1),
                "faults": {fault: count for fault, count in sorted(server.failed.items()) if count},
                "passed": report["passed"],
                "set_aside": report["set_aside"],
                "left": report["left"],
                "set_aside_without_history": sum(not row["history"] for row in aside),
                "answers_kept": _answers_kept(own),
                "answers_delivered": server.delivered.total(),
                "delivered_twice": sum(count - 1 for count in server.delivered.values()),
            }
    return found


def bench_kills(options: BenchOptions, folder: Path) -> dict[str, Any]:
    scripts = [Script(trajectory(seed)) for seed in range(options.count or 40)]
    rng = random.Random(options.seed)
    found: dict[str, Any] = {"samples_per_run": len(scripts), "concurrency": KILLED_CONCURRENCY}
    for name in modes(options):
        runs: list[dict[str, Any]] = []
        while sum(len(one["killed_after_calls"]) for one in runs) < options.kills:
            own = folder / f"{name}{len(runs)}"
            own.mkdir()
            write_chains(own / "chains.jsonl", scripts)
            runs.append(_killed_run(own, scripts, name == "batch", rng))
        found[name] = {
            "kills": sum(len(one["killed_after_calls"]) for one in runs),
            "most_answers_lost_by_a_kill": max(max(one["answers_lost"], default=0) for one in runs),
            "all_rows_as_without_kills": all(one["rows_as_without_kills"] == len(scripts) for one in runs),
            "runs": runs,
        }
    return found


def _killed_run(folder: Path, scripts: list[Script], is_batch: bool, rng: random.Random) -> dict[str, Any]:
    """Start a run again and again, each time killed at a random moment, until a start comes to the end."""
    killed_after, answers_lost, lost_before = [], [], 0
    with AnthropicServer(scripts, latency_s=ANSWER_S, batch_s=0.5) as server:
        more = ["--concurrency", str(KILLED_CONCURRENCY), *(["--batch"] if is_batch else [])]
        environment = os.environ | {"ANTHROPIC_API_KEY": KEY}
        while True:
            wanted = server.calls.total() + rng.randint(1, 8 if is_batch else len(scripts))
            with open(folder / "log.txt", "ab") as log:
                process = subprocess.Popen(
                    command(folder, server, *more), cwd=ROOT, env=environment, stdout=log, stderr=log
                )
            while server.calls.total() < wanted and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 2 * ANSWER_S))
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            time.sleep(4 * ANSWER_S)  # the server is still sending what was under way
            killed_after.append(server.calls.total())
            lost = server.delivered.total() - _answers_kept(folder)
            # What a batch has delivered is fetched by the next start.
            answers_lost.append(0 if is_batch else lost - lost_before)
            lost_before = lost
        rows = [row["deepseek_thinking_trajectory_parallel"] for row in read_rows(folder / "out" / "rows.jsonl")]
        same = sum(parse_think(row) == script.parts for row, script in zip(rows, scripts, strict=True))
        return {
            "killed_after_calls": killed_after,
            "calls": server.calls.total(),
            "exit_code": process.returncode,
            "rows_as_without_kills": same,
            "answers_delivered": server.delivered.total(),
            "answers_kept": _answers_kept(folder),
            "answers_lost": answers_lost,
            "answered_twice": sum(count - 1 for count in server.delivered.values()),
        }


def _answers_kept(folder: Path) -> int:
    return len(list((folder / "out" / "samples").glob("*/[0-9]*.json")))


def bench_throughput(options: BenchOptions, folder: Path) -> dict[str, Any]:
    count = options.count or 1_000
    files = sorted(Path(options.samples).glob("*.xml")) if options.samples else []
    trees = [parse_think(file.read_text(encoding="utf-8")) for file in files] or [trajectory(k) for k in range(14)]
    scripts = [Script(numbered(trees[k % len(trees)], k)) for k in range(count)]
    write_chains(folder / "chains.jsonl", scripts)
    with ReplayServer(scripts, ANSWER_S) as server, open(folder / "log.txt", "wb") as log:
        words = command(folder, server, "--concurrency", str(options.concurrency), "--workers", str(options.workers))
        environment = os.environ | {"ANTHROPIC_API_KEY": KEY}
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)
        peak_rss = _peak_rss(process)
        seen = server.end()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    answers = len(seen.begun)
    return {
        "samples": count,
        "characters": sum(len(script.text) for script in scripts),
        "concurrency": options.concurrency,
        "workers": options.workers,
        "answer_s": ANSWER_S,
        "exit_code": process.returncode,
        "answers": answers,
        "seconds": round(seen.ended[-1] - seen.begun[0], 1),
        "busy_share_while_work_is_left": round(seen.busy(seen.last_sample_begun) / options.concurrency, 3),
        "busy_share_to_the_end": round(seen.busy(seen.ended[-1]) / options.concurrency, 3),
        "curator_cpu_ms_per_answer": round(1_000 * (used.ru_utime + used.ru_stime - seen.cpu_s) / answers, 2),
        "server_cpu_ms_per_answer": round(1_000 * seen.cpu_s / answers, 2),
        "peak_rss_mib_of_all_processes": round(peak_rss / 2**20),
    }


def _peak_rss(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end; the largest sum of the memory of the process and its children, pages that they share twice."""
    peak, own = 0, psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, sum(one.memory_info().rss for one in [own, *own.children(recursive=True)]))
        time.sleep(0.5)
    return peak


def main() -> None:
    options = parse_options(BenchOptions)
    parts = {"faults": bench_faults, "kills": bench_kills, "throughput": bench_throughput}
    with tempfile.TemporaryDirectory() as folder:
        figures = parts[options.part](options, Path(folder))
    chosen = {**dataclasses.asdict(options), "samples": bool(options.samples)}
    made = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({**made, "options": chosen, **figures}, indent=2))


if __name__ == "__main__":
    run_tool(main)
