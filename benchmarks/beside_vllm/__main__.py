"""Measures the engine beside vLLM on one GPU, in turn, with random weights: no trained model, no network.

    python -m benchmarks.beside_vllm --vllm-path /tmp/vllm --output runs/beside_vllm.json
    python -m benchmarks.beside_vllm --vllm-path /tmp/vllm --parts decode --rounds 5

vLLM and what it needs beyond this environment lie in a folder of their own (`pip install --target`), so that neither
meets the other's versions. All engines start at the same time and run each case once, for what is compiled; then one at
a time measures, in turn, while the others wait for input. vLLM has its defaults, but for the size of its cache, which
would be all of the GPU.

block: eight paths of 512 tokens after a prefix of 16,384 that both have in their prefix caches, the join and a
conclusion of 64 tokens. long: the same after 65,536. decode: requests that write text, as in tools/bench_engine.py, of
Qwen2.5-1.5B, also beside vLLM's earlier runner, since either is faster at times; decode-7b: of Qwen2.5-7B. uneven,
uneven-7b: the same with prompts of 100 to 2,000 tokens, since requests of a server are not of one length. prompts,
prompts-7b: one request after a prompt of each of some lengths, for the time to its first token (`begun_seconds`). What
vLLM does for a block: `theirs.py`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.beside_vllm.process import WorkerProcess
from megatron_multiverse.checkpoints.formats.hf_config import model_config_to_hf
from megatron_multiverse.checkpoints.names.registry import FAMILIES
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config.choices import DType
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference.bench_model import prompt_lengths
from megatron_multiverse.model.families import preset

LONGEST_CASE = 60.0
"""Seconds after which a measurement is given up."""
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy draws do not need it, and FlashInfer may not be there
}


@dataclass(frozen=True, kw_only=True)
class BesideConfig:
    """What is measured."""

    vllm_path: Path
    """Folder with vLLM and its packages."""
    parts: tuple[
        Literal["block", "decode", "long", "decode-7b", "uneven", "uneven-7b", "prompts", "prompts-7b"], ...
    ] = (
        "block",
        "decode",
        "long",
        "decode-7b",
        "uneven",
        "uneven-7b",
        "prompts",
        "prompts-7b",
    )
    """Measurements to make, in this order."""
    rounds: int = 3
    """Measurements of each case by each engine; the median counts, all are written."""
    block_preset: str = "qwen2.5-7b"
    """block, long, decode-7b, uneven-7b, prompts-7b: published shape; model/families.py lists them."""
    decode_preset: str = "qwen2.5-1.5b"
    """decode, uneven, prompts: published shape."""
    dtype: DType = "bf16"
    """Of our weights and cache; vLLM's are bf16."""
    prefix: int = 16384
    """block: tokens before the paths; long: four times as many."""
    path_tokens: int = 512
    """block, long: tokens of each of eight paths."""
    batch: tuple[int, ...] = (1, 8, 32, 128)
    """decode: requests at once; uneven: those of them that are more than 8."""
    context: int = 1024
    """decode: tokens of each prompt."""
    uneven_context: tuple[int, int] = (100, 2000)
    """uneven: tokens of the shortest and of the longest prompt; the others lie evenly in between, in mixed order."""
    new_tokens: int = 128
    """decode, uneven: tokens that each request writes."""
    prompt_tokens: tuple[int, ...] = (150, 300, 1000, 2000, 4000)
    """prompts, prompts-7b: tokens of the prompt."""
    vllm_cache_gib: float = 12.0
    """GiB of each vLLM's cache of keys and values."""
    start_seconds: float = 170.0
    """Most until all engines are ready; those that are not are left out."""
    seconds: float = 600.0
    """Most that everything takes; what comes later is left out."""
    commit: str = ""
    """Kept with the figures."""
    work: Path | None = None
    """Folder for the engines' logs and what vLLM compiles; unset for a temporary one."""
    output: Path | None = None
    """JSON file for all runs, written after each."""

    def __post_init__(self) -> None:
        for name in ("rounds", "prefix", "path_tokens", "context", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        shortest, most = self.uneven_context
        if not 0 < shortest <= most:
            raise ConfigError(f"uneven_context must be two numbers of tokens, the smaller first, got {shortest} {most}")
        if not (self.vllm_path / "vllm").is_dir():
            raise ConfigError(
                f"{self.vllm_path} has no vllm: install it there with pip install --target {self.vllm_path} vllm"
            )


def cases_of(config: BesideConfig, part: str) -> list[dict[str, Any]]:
    """What a part measures."""
    if part in ("block", "long"):
        prefix = config.prefix * (4 if part == "long" else 1)
        return [{"kind": "block", "prefix": prefix, "paths": 8, "tokens": config.path_tokens, "conclusion": 64}]
    if part.startswith("prompts"):
        return [{"kind": "decode", "batch": 1, "context": length, "tokens": 17} for length in config.prompt_tokens]
    if part.startswith("uneven"):
        shortest, context = config.uneven_context
        of_all = {"kind": "decode", "shortest": shortest, "context": context, "tokens": config.new_tokens}
        return [{**of_all, "batch": batch} for batch in config.batch if batch > 8]
    return [
        {"kind": "decode", "batch": batch, "context": config.context, "tokens": config.new_tokens}
        for batch in config.batch
    ]


def sides_of(part: str) -> list[str]:
    """The engines that a part compares, ours first."""
    if part in ("decode", "uneven", "prompts"):
        return ["ours small", "vllm small", "vllm small earlier runner"]
    return ["ours", "vllm long" if part == "long" else "vllm"]


def told(case: dict[str, Any]) -> dict[str, Any]:
    """The case as engines get it: with the tokens of each prompt, which are the same for all of them."""
    if case["kind"] != "decode":
        return case
    lengths = prompt_lengths(case.get("shortest", case["context"]), case["context"], case["batch"])
    return {**case, "lengths": lengths}


def longest(case: dict[str, Any]) -> int:
    """Tokens of the longest request that vLLM gets for a case, and some more."""
    if case["kind"] == "decode":
        return int(case["context"] + case["tokens"]) + 64
    return int(case["prefix"] + case["paths"] * (case["tokens"] + 16) + case["conclusion"]) + 64


def vllm_config(name: str) -> dict[str, Any]:
    """config.json of a published shape, in the first family with its biases and norms."""
    shape = preset(name)
    family = next(
        family
        for family in FAMILIES.values()
        if (family.add_qkv_bias, family.qk_layernorm) == (shape.add_qkv_bias, shape.qk_layernorm)
    )
    return {key: value for key, value in model_config_to_hf(shape, family).items() if value is not None}


def start(config: BesideConfig, side: str, folder: Path) -> WorkerProcess:
    """Start an engine with the cases of all parts that it takes part in."""
    small = "small" in side
    model = config.decode_preset if small else config.block_preset
    cases = [told(case) for part in config.parts if side in sides_of(part) for case in cases_of(config, part)]
    own = folder / side.replace(" ", "_")
    caches = {"VLLM_CACHE_ROOT": str(own), "TRITON_CACHE_DIR": str(own / "triton")}
    if side.startswith("ours"):
        setup: dict[str, Any] = {"model_preset": model, "dtype": config.dtype, "cases": cases}
        return WorkerProcess(side, "benchmarks.beside_vllm.ours", setup, {}, folder)
    length = max(map(longest, cases))
    shape = vllm_config(model)
    shape["max_position_embeddings"] = max(length, shape["max_position_embeddings"])
    cache = int(config.vllm_cache_gib * 2**30)
    options = {"max_model_len": length, "kv_cache_memory_bytes": cache, "gpu_memory_utilization": 0.05}
    environment = {**OFFLINE, **caches, "PYTHONPATH": str(config.vllm_path)}
    if "earlier" in side:
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    setup = {"config": shape, "folder": str(own / "model"), "options": options, "cases": cases}
    return WorkerProcess(side, "benchmarks.beside_vllm.theirs", setup, environment, folder)


def measure(config: BesideConfig, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each run: part, case, engine, round and figures. The first one says what has started."""
    began = time.monotonic()
    sides = dict.fromkeys(side for part in config.parts for side in sides_of(part))
    workers = {side: start(config, side, folder) for side in sides}
    try:
        for worker in workers.values():
            worker.wait_until_ready(began + min(config.start_seconds, config.seconds))
            print(f"{worker.name}: {worker.ready or worker.failed}", flush=True)
        yield {side: worker.ready or {"failed": worker.failed} for side, worker in workers.items()}
        for part in config.parts:
            for case in cases_of(config, part):
                for number in range(config.rounds):
                    for side in sides_of(part):
                        until = min(time.monotonic() + LONGEST_CASE, began + config.seconds)
                        figures = workers[side].measure(told(case), until)
                        if figures is not None:
                            yield {"part": part, "case": case, "side": side, "round": number, **figures}
    finally:
        for worker in workers.values():
            worker.end()


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each case and engine."""
    for key in dict.fromkeys((row["part"], str(row["case"]), row["side"]) for row in rows):
        runs = [row for row in rows if (row["part"], str(row["case"]), row["side"]) == key]
        case = runs[0]["case"]
        times = ("ms_per_step", "seconds", "begun_seconds") if case["kind"] == "decode" else ("ms_per_step", "seconds")
        listed = {name: [run[name] for run in runs] for name in times}
        tokens = f"{case['shortest']}..{case['context']}" if "shortest" in case else case.get("context")
        what = f"prefix {case['prefix']}" if case["kind"] == "block" else f"{case['batch']} x {tokens}"
        figures = "  ".join(f"{name} {statistics.median(values):.3f} {values}" for name, values in listed.items())
        print(f"{key[0]:10} {what:13} {key[2]:26} {figures}", flush=True)


def main() -> None:
    """Measure, and write after each run."""
    config = parse_options(BesideConfig)
    work = config.work or Path(tempfile.mkdtemp())
    for folder in (work, *([] if config.output is None else [config.output.parent])):
        folder.mkdir(parents=True, exist_ok=True)
    print(f"logs: {work}", flush=True)
    found = measure(config, work)
    report: dict[str, Any] = {"commit": config.commit, "date": time.strftime("%Y-%m-%d"), "engines": next(found)}
    report["runs"] = []
    for row in found:
        report["runs"].append(row)
        if config.output is not None:  # at once: a run that is cut short keeps what it has
            config.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report["runs"])


if __name__ == "__main__":
    run_tool(main)
