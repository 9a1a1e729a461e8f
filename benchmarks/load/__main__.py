"""Goodput under load, by how wide steps are: never fork, always fork, by step time.

    python -m benchmarks.load

Three traces on a simulated H200 (law.py) under the engine's own scheduler (simulator.py), about a minute each on one
core. Writes the figures as JSON and as a table, and draws them; what is run again replaces its figures.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.load.plot import draw
from benchmarks.load.simulator import POLICIES, SLO_SECONDS, Simulation, series, summary
from benchmarks.load.users import TRACES
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.errors import ConfigError

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is simulated."""

    traces: tuple[str, ...] = tuple(trace.name for trace in TRACES)
    """Names of traces, by default all."""
    policies: tuple[str, ...] = tuple(policy.name for policy in POLICIES)
    """Names of policies, by default all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of lengths, pauses and noise; the lowest is drawn."""
    output: Path = RESULTS
    """Folder of the results."""


HEADER = f"""# Goodput under load, simulated: 7B on one H200

Goodput: tokens per second of requests whose tokens came within {1000 * SLO_SECONDS:.0f} ms of each other on average
(column "within": their share). Gap: time between the tokens of users whose answers do not fork. The model is a law of
step times fitted to measured points (../law.py); scheduler, page book and grammar are the engine's.

| Trace | Policy | Seed | Goodput | Tokens/s | Within | Gap p50, ms | Gap p99, ms | First token p50, s | p99, s | Rows |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def table(results: dict[str, Any]) -> str:
    """The figures as markdown."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    forms = {
        "goodput_tokens_per_second": ",.0f",
        "tokens_per_second": ",.0f",
        "requests_within_slo": ".1%",
        "serial_gap_p50_ms": ".1f",
        "serial_gap_p99_ms": ".1f",
        "first_token_p50_s": ".2f",
        "first_token_p99_s": ".2f",
        "mean_rows": ".0f",
    }
    rows = [
        " | ".join(["", name, policy, seed, *(cell(run[key], form) for key, form in forms.items()), ""]).strip()
        for name, runs in results["traces"].items()
        for policy, seeds in runs.items()
        for seed, run in seeds["summaries"].items()
    ]
    beside = [ratios(name, runs) for name, runs in results["traces"].items() if len(runs) == len(POLICIES)]
    return HEADER + "\n".join([*rows, "", *beside, f"{results['date']}, `{results['command']}`", ""])


def ratios(name: str, runs: dict[str, Any]) -> str:
    """What `by step time` is worth, over all seeds that every policy has run."""
    never, always, ours = (runs[policy.name]["summaries"] for policy in POLICIES)
    seeds = [seed for seed in ours if seed in never and seed in always]

    def spread(other: dict[str, Any], key: str) -> str:
        values = [ours[seed][key] / other[seed][key] for seed in seeds if ours[seed][key] and other[seed][key]]
        return f"{min(values):.2f} to {max(values):.2f}" if values else "-"

    goodput, gap = "goodput_tokens_per_second", "serial_gap_p99_ms"
    return (
        f"{name}, by step time over {len(seeds)} seeds: goodput {spread(never, goodput)} times never, "
        f"{spread(always, goodput)} times always; gap p99 {spread(never, gap)} times never.\n"
    )


def main() -> None:
    options = parse_options(Options)
    torch.set_num_threads(1)
    traces, policies = {trace.name: trace for trace in TRACES}, {policy.name: policy for policy in POLICIES}
    for what, names, known in (("traces", options.traces, traces), ("policies", options.policies, policies)):
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(f"--{what} {unknown}: there are {', '.join(known)}")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "load_h200_7b.json"
    runs: dict[str, Any] = json.loads(path.read_text())["traces"] if path.exists() else {}
    for trace in options.traces:
        for policy in options.policies:
            kept = runs.setdefault(trace, {}).setdefault(policy, {"summaries": {}})
            for seed in options.seeds:
                simulation = Simulation(traces[trace], policies[policy], seed).run()
                figures = kept["summaries"][str(seed)] = summary(simulation)
                if str(seed) == min(kept["summaries"], key=int):
                    kept["series"] = series(simulation)
                shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if value is not None)
                print(f"{trace}, {policy}, seed {seed}: {shown}", flush=True)
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python -m benchmarks.load",
        "traces": {
            trace: {policy: runs[trace][policy] for policy in policies if policy in runs[trace]}
            for trace in traces
            if trace in runs
        },
    }
    path.write_text(json.dumps(results) + "\n")
    (options.output / "load_h200_7b.md").write_text(table(results))
    draw(results, options.output / "load_h200_7b.png")


if __name__ == "__main__":
    run_tool(main)
