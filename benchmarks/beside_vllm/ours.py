"""Our side of `benchmarks.beside_vllm`: one engine, with random weights, and a script that says what a block holds."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from benchmarks.beside_vllm.worker import Measure, serve, step_figures
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.dtypes import DTYPES
from megatron_multiverse.inference import Engine, Request
from megatron_multiverse.inference.bench import step_times
from megatron_multiverse.inference.bench_blocks import LABEL
from megatron_multiverse.inference.bench_model import copy_rate, random_model, random_prompt
from megatron_multiverse.inference.bench_script import CONCLUSION, VOCAB, Script, block_header, block_script
from megatron_multiverse.model.device import choose_device, device_name
from megatron_multiverse.model.families import preset

PAGE = 16


class Client:
    """Drives our engine.

    Args:
        setup: `model_preset`, `dtype`, `cases`; the cache has room for the largest case, and a block's prompt twice.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self.device = choose_device("auto")
        self.shape = preset(setup["model_preset"])
        tokens, rows = 0, 8
        for case in setup["cases"]:
            tokens = max(tokens, _tokens(case) * (1 if case["kind"] == "decode" else 2))
            rows = max(rows, case["batch"] if case["kind"] == "decode" else case["paths"] + 1)
        sizes = EngineConfig(num_pages=tokens // PAGE, page_size=PAGE, max_rows=rows)
        model = random_model(self.shape, DTYPES[setup["dtype"]], self.device)
        self.engine = Engine(model, VOCAB, sizes, vocab_size=self.shape.vocab_size, max_position=1 << 20)
        self.sampler = self.engine.runner.sampler
        self.seeds = itertools.count(1)
        self.seen: set[str] = set()

    def measure(self, case: dict[str, Any]) -> dict[str, Any]:
        """Figures of a case; the first time it runs twice, so that the prefix cache has its prompt."""
        if case["kind"] == "decode":
            return self.decode(case)
        if str(case) not in self.seen:
            self.seen.add(str(case))
            self.block(case)
        return self.block(case)

    def block(self, case: dict[str, Any]) -> dict[str, Any]:
        """From the step that forks until the answer ends, of a request whose prompt the prefix cache holds."""
        if case["conclusion"] != CONCLUSION:
            raise ValueError(f"the script writes a conclusion of {CONCLUSION} tokens, not {case['conclusion']}")
        engine, paths = self.engine, case["paths"]
        engine.runner.sampler = Script(block_script(paths, case["tokens"]))
        graphs = self._graphs()
        sampling = SamplingParams(max_tokens=_tokens(case) - case["prefix"])
        engine.add_request(Request(prompt_ids=random_prompt(case["prefix"], self.shape, 0), sampling=sampling))
        times: list[float] = []
        inside: list[float] = []
        done: list[Any] = []
        while not done:
            before, start = len(engine.scheduler.places.nodes), time.perf_counter()
            done = engine.step()
            seconds = time.perf_counter() - start
            if times or max(before, len(engine.scheduler.places.nodes)) > 1:
                times.append(seconds)
            if before > paths:
                inside.append(seconds)
        engine.runner.sampler = self.sampler
        (result,) = done
        assert len(result.blocks) == 1 and result.finish_reason == "stop", "the script did not play as written"
        return {
            **step_figures(inside),
            "seconds": round(sum(times), 4),
            "cached_tokens": result.cached_tokens,
            "new_graphs": self._graphs() - graphs,
        }

    def decode(self, case: dict[str, Any]) -> dict[str, Any]:
        """`batch` requests with prompts of their own write text."""
        engine, graphs, start = self.engine, self._graphs(), time.perf_counter()
        sampling = SamplingParams(max_tokens=case["tokens"], ignore_eos=True, max_depth=0)
        for length in case["lengths"]:
            prompt = random_prompt(length, self.shape, next(self.seeds))
            engine.add_request(Request(prompt_ids=prompt, sampling=sampling))
        begun, steps = 0.0, []
        for step in step_times(engine, batch=case["batch"]):
            begun = begun or time.perf_counter() - start - step
            steps.append(step)
        times = {"seconds": time.perf_counter() - start, "begun_seconds": begun}
        figures = {name: round(value, 4) for name, value in times.items()}
        return {**step_figures(steps), **figures, "new_graphs": self._graphs() - graphs}

    def _graphs(self) -> int:
        graphs = self.engine.runner.graphs
        return 0 if graphs is None else len(graphs.graphs)


def _tokens(case: dict[str, Any]) -> int:
    """At most, of all answers together, in whole pages."""
    if case["kind"] == "decode":
        return int(case["batch"] * (case["context"] + case["tokens"] + 2 * PAGE))
    paths: int = case["paths"]
    more = paths * (case["tokens"] + LABEL + 4 * PAGE) + len(block_header(paths)) + CONCLUSION + 4 * PAGE
    return int(case["prefix"] + more)


def begin(setup: dict[str, Any]) -> tuple[Measure, dict[str, Any]]:
    """Build model and engine."""
    client = Client(setup)
    said: dict[str, Any] = {"gpu": device_name(client.device), "torch": torch.__version__}
    said["copy_TB_per_second"] = round(copy_rate(client.device) / 1e12, 3)
    if client.device.type == "cuda":
        torch.cuda.empty_cache()  # others share the GPU
    return client.measure, said


if __name__ == "__main__":
    serve(begin)
