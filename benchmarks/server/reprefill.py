"""What it costs a Multiverse model to be served by a stock engine: re-prefill join beside the engine's own.

The same problems are answered in both ways by one server. Then the answers of the engine are scored as a stock engine
reads them, as one causal text, and each drawn token's log-probability is held against the engine's own.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx2

from megatron_multiverse.clients.http import connect, post
from megatron_multiverse.clients.local_server import local_server
from megatron_multiverse.clients.reprefill import Reprefill

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
PROBLEMS = 60
MOST_TOKENS = 900


def measure_reprefill() -> dict[str, Any]:
    """Shares of right answers, work, and how far log-probabilities move."""
    report = asyncio.run(_measure())
    for name in ("engine", "reprefill"):
        print(name, report[name])
    for region, row in report["moved"].items():
        print(f"{region:22} {row}", flush=True)
    return report


async def _measure() -> dict[str, Any]:
    ways: dict[str, list[dict[str, Any]]] = {"engine": [], "reprefill": []}
    moved: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    async with local_server({"load": MODEL}) as (url, _), connect(url) as client:
        plain = Reprefill(client, {"temperature": 0, "multiverse": {"enabled": False}})
        for prompt, answer in _problems():
            sampling = {"max_new_tokens": MOST_TOKENS, "temperature": 0}
            native = await post(client, "/generate", {"text": prompt, "sampling_params": sampling})
            row = await plain.answer(prompt, MOST_TOKENS)
            facts = native["multiverse"]
            ways["engine"].append(
                {
                    "right": native["text"].endswith(answer),
                    "tokens": len(native["output_ids"]),
                    "prompt_tokens": native["meta_info"]["prompt_tokens"],
                    "requests": 1,
                    "critical_tokens": facts["critical_tokens"],
                }
            )
            ways["reprefill"].append(
                {name: row[name] for name in ("tokens", "prompt_tokens", "requests", "critical_tokens")}
                | {"right": row["text"].endswith(answer)}
            )
            for region, by, agrees in await _moves(client, native["multiverse"]["tree"]):
                moved[region].append((by, agrees))
    report: dict[str, Any] = {"model": "examples/quickstart/model", "problems": PROBLEMS}
    for name, rows in ways.items():
        report[name] = {key: round(statistics.mean(row[key] for row in rows), 3) for key in sorted(rows[0])}
    report["moved"] = {region: _summary(values) for region, values in sorted(moved.items())}
    return report


def _problems() -> list[tuple[str, str]]:
    rng = random.Random(0)
    problems = []
    for k in range(PROBLEMS):
        sums = [(rng.randint(10, 999), rng.randint(10, 999)) for _ in range(2 + k % 3)]
        asked = "; ".join(f"{name} = {a} + {b}" for name, (a, b) in zip("ABCD", sums, strict=False))
        answer = "; ".join(f"{name} = {a + b}" for name, (a, b) in zip("ABCD", sums, strict=False))
        problems.append(
            (f"Work out {asked}. Think step by step and in parallel before answering.", f"Answer: {answer}")
        )
    return problems


async def _moves(client: httpx2.AsyncClient, tree: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """For each drawn token: where it stands, by how much its log-probability moves, whether it stays the likeliest."""
    prompt, ids = tree["prompt_ids"], tree["token_ids"]
    body = {"prompt": [*prompt, *ids], "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    found = (await post(client, "/v1/completions", body))["choices"][0]["logprobs"]
    causal, tops = found["token_logprobs"][len(prompt) :], found["top_logprobs"][len(prompt) :]
    regions = ["before the block"] * len(ids)
    for block in tree["blocks"]:
        for k, branch in enumerate(block["branches"]):
            name = "first paths" if k == 0 else "later paths"
            regions[branch["start"] : branch["end"]] = [name] * (branch["end"] - branch["start"])
        end = block["branches"][-1]["end"]
        regions[end:] = ["after the join"] * (len(ids) - end)
    return [
        (region, abs(own - other), other == max(top.values()))
        for region, own, other, top in zip(regions, tree["logprobs"], causal, tops, strict=True)
        if own is not None
    ]


def _summary(values: list[tuple[float, bool]]) -> dict[str, Any]:
    moves = [by for by, _ in values]
    return {
        "tokens": len(values),
        "mean": round(statistics.mean(moves), 5),
        "largest": round(max(moves), 3),
        "still_likeliest": round(statistics.mean(agrees for _, agrees in values), 4),
    }
