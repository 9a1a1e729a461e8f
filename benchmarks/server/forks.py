"""The server while every answer forks: fixed work on random weights, in closed and open loop, paths at once and one by
one."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.server.overhead import TOKENIZER, Prompts, save_random_model
from megatron_multiverse.clients.load import CONCLUSION_TOKENS, LoadConfig, measure
from megatron_multiverse.clients.local_server import local_server
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.model.device import choose_device, device_name

if TYPE_CHECKING:
    from benchmarks.server.__main__ import ServerBenchConfig

PAGE_SIZE = 16
TAG_TOKENS = 32
"""More than header, label and closing tags of a path take."""


def measure_forks(config: ServerBenchConfig) -> dict[str, Any]:
    """A row of figures for each case."""
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(config, folder)
        prompts = Prompts(build_tokenizer("HuggingFaceTokenizer", TOKENIZER).vocab_size)
        lines = [json.dumps({"prompt": ids}) + "\n" for ids in prompts.draw(config.requests, config.context)]
        (Path(folder) / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
        rows = asyncio.run(_measure(config, folder))
    for row in rows:
        case = f"rate {row['rate']:.2f}/s" if "rate" in row else f"{row['concurrency']} clients"
        print(
            f"{case:12} {row['paths']:11} {row['tokens_per_second']:8.1f} tokens/s, "
            f"num_parallel {row['num_parallel']:.2f}, "
            f"first token {row['ttft_ms_p50']:.0f} / {row['ttft_ms_p99']:.0f} ms, "
            f"answer {row['latency_ms_p50']:.0f} / {row['latency_ms_p99']:.0f} ms (p50 / p99), "
            f"{row['num_errors']} errors",
            flush=True,
        )
    settings = {name: getattr(config, name) for name in ("context", "branches", "new_tokens", "requests")}
    report = {"device": device_name(choose_device("auto")), "model": config.model_preset, "dtype": config.dtype}
    return report | settings | {"rows": rows}


async def _measure(config: ServerBenchConfig, folder: str) -> list[dict[str, Any]]:
    # Each path begins on a page of its own.
    path_pages = -(-(config.new_tokens + TAG_TOKENS) // PAGE_SIZE) + 1
    pages = -(-(config.context + CONCLUSION_TOKENS) // PAGE_SIZE) + config.branches * path_pages + 2
    options = {
        "load": folder,
        "tokenizer-model": TOKENIZER,
        "dtype": config.dtype,
        "engine.page-size": PAGE_SIZE,
        "engine.num-pages": max(config.batch) * pages,
        "engine.max-rows": max(config.batch) * config.branches,
        "engine.max-paths": config.branches,
    }
    rows: list[dict[str, Any]] = []
    async with local_server(options) as (url, _):
        load = LoadConfig(
            url=url,
            prompts=Path(folder) / "prompts.jsonl",
            num_requests=config.requests,
            concurrency=list(config.batch),
            forced_branches=config.branches,
            forced_tokens=config.new_tokens,
        )
        rows += [row | {"paths": "at once"} async for row in measure(load)]
        most = rows[-1]["answers_per_second"]
        opened = dataclasses.replace(load, concurrency=[], rate=[most * share for share in config.load])
        rows += [row | {"paths": "at once"} async for row in measure(opened)]
        in_turn = dataclasses.replace(load, concurrency=[min(config.batch)], max_concurrent_branches=1)
        rows += [row | {"paths": "one by one"} async for row in measure(in_turn)]
    for row in rows:
        if row["paths_per_answer"] != config.branches:
            raise GenerationError(f"an answer had {row['paths_per_answer']} paths instead of {config.branches}: {row}")
    return rows
