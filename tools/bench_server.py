"""Loads a server and measures how it bears it: time to the first token, per token, whole answers; throughput, goodput.

Example:
    python tools/bench_server.py --url http://127.0.0.1:5000 --concurrency 1 8 32
    python tools/bench_server.py --url http://127.0.0.1:5000 --concurrency --rate 2 4 8 --num-requests 100
    python tools/bench_server.py --url http://127.0.0.1:5000 --forced-branches 8 --forced-tokens 128

Works with any server that has OpenAI's /v1/completions with streams and usage. --concurrency is a closed loop, --rate
an open one with clients at random times. Tokens of all branches count. --forced-branches begins every answer with a
block of so many paths of equal length, whatever the weights are: fixed work, which needs no trained model. The exit
status is 1 where a measurement got no answer.
"""

from __future__ import annotations

import asyncio
import json
import sys

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.errors import GenerationError


async def run() -> None:
    """Print a line per case, and write them if asked to."""
    from megatron_multiverse.clients.load import LoadConfig, measure

    config = parse_options(LoadConfig)
    rows = []
    async for row in measure(config):
        rows.append(row)
        case = f"concurrency {row['concurrency']}" if "concurrency" in row else f"rate {row['rate']:g}/s"
        if row["errors"]:
            print(f"{case}: {row['num_errors']} errors, such as: {row['errors'][0]}", file=sys.stderr)
        if not row["answers"]:
            continue
        print(
            f"{case}: {row['tokens_per_second']:.0f} tokens/s, num_parallel {row['num_parallel']:.2f}, "
            f"{row['tokens_per_answer']:.0f} tokens per answer, "
            f"TTFT {row['ttft_ms_p50']:.0f} / {row['ttft_ms_p95']:.0f} / {row['ttft_ms_p99']:.0f} ms, "
            f"per token {row['tpot_ms_p50']:.1f} / {row['tpot_ms_p95']:.1f} / {row['tpot_ms_p99']:.1f} ms, "
            f"answer {row['latency_ms_p50']:.0f} / {row['latency_ms_p95']:.0f} / {row['latency_ms_p99']:.0f} ms "
            f"(p50 / p95 / p99), goodput {row['goodput_per_second']:.2f}/s, {row['num_errors']} errors",
            flush=True,
        )
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if empty := sum(not row["answers"] for row in rows):
        raise GenerationError(f"{empty} of {len(rows)} measurements got no answer; what the server said stands above")


if __name__ == "__main__":
    run_tool(lambda: asyncio.run(run()))
