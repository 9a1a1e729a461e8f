"""The server beside the engine in this process."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import torch

from megatron_multiverse.clients.http import connect, post, stream
from megatron_multiverse.clients.local_server import local_server
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.dtypes import DTYPES
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.bench_model import random_model
from megatron_multiverse.inference.build import build_engine
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.model.device import choose_device, device_name
from megatron_multiverse.model.families import preset
from megatron_multiverse.model.weights import save_model

if TYPE_CHECKING:
    from benchmarks.server.__main__ import ServerBenchConfig

TOKENIZER = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
TEXT = "/v1/completions"


def measure_overhead(config: ServerBenchConfig) -> dict[str, Any]:
    """Figures of both ways."""
    device = choose_device("auto")
    longest = max(config.context + config.new_tokens, config.prompt + 1)
    engine_config = EngineConfig(
        page_size=16, num_pages=max(config.batch) * (-(-longest // 16) + 2), max_rows=max(8, *config.batch)
    )
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_random_model(config, folder)
        prompts = Prompts(build_tokenizer("HuggingFaceTokenizer", TOKENIZER).vocab_size)
        own = _engine_figures(config, folder, engine_config, prompts)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        served = asyncio.run(_server_figures(config, folder, engine_config, prompts))
    bound = 2 * parameters * config.prompt / config.teraflops / 1e9
    report: dict[str, Any] = {"device": device_name(device), "model": config.model_preset, "dtype": config.dtype}
    report |= {"context": config.context, "new_tokens": config.new_tokens, "prompt": config.prompt}
    report["first_token_ms"] = {"engine": own["first"], "server": served["first"], "compute_bound": round(bound, 2)}
    report["tokens_per_second"] = [
        {
            "batch": batch,
            "engine": own[batch],
            "server_whole": served[batch, False],
            "server_streams": served[batch, True],
        }
        for batch in config.batch
    ]
    _show(report)
    return report


def save_random_model(config: ServerBenchConfig, folder: str) -> int:
    """Write random weights of the asked shape; returns how many there are."""
    shape = preset(config.model_preset)
    model = random_model(shape, DTYPES[config.dtype], choose_device("auto"))
    save_model(model, shape, folder)
    return sum(weight.numel() for weight in model.parameters())


class Prompts:
    """Random prompts, none of which begins like another.

    Args:
        vocab_size: ids to draw from.
    """

    def __init__(self, vocab_size: int) -> None:
        self._rng = random.Random(0)
        self._vocab_size = vocab_size

    def draw(self, count: int, length: int) -> list[list[int]]:
        """So many prompts."""
        return [[self._rng.randrange(100, self._vocab_size) for _ in range(length)] for _ in range(count)]


def _repeat(config: ServerBenchConfig, once: Callable[[], float]) -> list[float]:
    return [once() for _ in range(config.repeats + 1)][1:]


def _engine_figures(config: ServerBenchConfig, folder: str, sizes: EngineConfig, prompts: Prompts) -> dict[Any, Any]:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", TOKENIZER)
    device = choose_device("auto")
    engine = build_engine(folder, tokenizer, sizes, dtype=DTYPES[config.dtype], device=device)

    def rate(batch: int) -> float:
        requests = [_request(ids, config.new_tokens) for ids in prompts.draw(batch, config.context)]
        start = time.perf_counter()
        results = engine.generate(requests)
        seconds = time.perf_counter() - start
        # Counted: random weights may open what the last tokens have to close, which takes room.
        return sum(len(result.token_ids) for result in results) / seconds

    figures: dict[Any, Any] = {batch: _repeat(config, lambda batch=batch: rate(batch)) for batch in config.batch}  # type: ignore[misc]
    figures["first"] = _repeat(config, lambda: _first_token(engine, prompts.draw(1, config.prompt)[0]))
    engine.close()
    return figures


def _request(ids: list[int], tokens: int) -> Request:
    return Request(prompt_ids=ids, sampling=SamplingParams(max_tokens=tokens, ignore_eos=True, max_depth=0))


def _first_token(engine: Engine, ids: list[int]) -> float:
    start = time.perf_counter()
    engine.generate([_request(ids, 1)])
    return 1e3 * (time.perf_counter() - start)


async def _server_figures(
    config: ServerBenchConfig, folder: str, sizes: EngineConfig, prompts: Prompts
) -> dict[Any, Any]:
    options = {
        "load": folder,
        "tokenizer-model": TOKENIZER,
        "dtype": config.dtype,
        "engine.page-size": sizes.page_size,
        "engine.num-pages": sizes.num_pages,
        "engine.max-rows": sizes.max_rows,
    }
    figures: dict[Any, Any] = {}
    async with local_server(options) as (url, _), connect(url) as client:
        for batch in config.batch:
            for streams in (False, True):
                rates = []
                for _ in range(config.repeats + 1):
                    bodies = [_body(ids, config.new_tokens) for ids in prompts.draw(batch, config.context)]
                    start = time.perf_counter()
                    tokens = await asyncio.gather(*(_answer(client, body, streams) for body in bodies))
                    rates.append(sum(tokens) / (time.perf_counter() - start))
                figures[batch, streams] = rates[1:]
        times = [await _first_piece(client, prompts.draw(1, config.prompt)[0]) for _ in range(config.repeats + 1)]
        figures["first"] = times[1:]
    return figures


def _body(ids: list[int], tokens: int) -> dict[str, Any]:
    fields = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "multiverse": {"enabled": False}}
    return {"prompt": ids, **fields}


async def _answer(client: httpx2.AsyncClient, body: dict[str, Any], streams: bool) -> int:
    """Read an answer; returns its tokens."""
    if not streams:
        return int((await post(client, TEXT, body))["usage"]["completion_tokens"])
    end = b""
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", TEXT, json=body) as response:
        async for data in response.aiter_raw():  # not parsed: the client must not be what is measured
            end = (end + data)[-4096:]
    *_, usage, done = end.decode(errors="replace").strip().split("\n\n")
    if done != "data: [DONE]":
        raise GenerationError(f"a stream of the server broke off: ...{done[-300:]}")
    return int(json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"])


async def _first_piece(client: httpx2.AsyncClient, ids: list[int]) -> float:
    start = time.perf_counter()
    body = _body(ids, 1)
    body["multiverse"] |= {"stream_mode": "branches"}  # it tells of tokens that are no whole character, too
    async for chunk in stream(client, TEXT, body):
        if "tokens" in chunk["choices"][0].get("multiverse", {}):
            return 1e3 * (time.perf_counter() - start)
    raise GenerationError("a stream of the server ended without a token")


def _show(report: dict[str, Any]) -> None:
    print(f"{report['device']}, {report['model']}, {report['dtype']}")
    for row in report["tokens_per_second"]:
        engine, whole, streams = (statistics.median(row[name]) for name in ("engine", "server_whole", "server_streams"))
        print(
            f"batch {row['batch']:<4} engine {engine:8.1f} tokens/s, server {whole:8.1f} ({whole / engine:.3f}), "
            f"streams {streams:8.1f} ({streams / engine:.3f})"
        )
    first = report["first_token_ms"]
    print(
        f"first token after {report['prompt']} tokens: engine {statistics.median(first['engine']):.1f} ms, "
        f"server {statistics.median(first['server']):.1f} ms, compute bound {first['compute_bound']:.1f} ms",
        flush=True,
    )
