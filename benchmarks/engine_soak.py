"""The engine under load for as long as one likes: every request forks, and every answer is checked.

    python -m benchmarks.engine_soak --seconds 600 --output runs/soak.json

So many requests are in work at any time, over a cache that is too small for all of them, so some step back and are fed
again; some are cancelled. Each answer begins with a block's header, half of them are greedy. One plain forward pass
over each answer, with the layout that training gives it, says what every drawn token's log-probability is, and that a
greedy one was the best. At the end no page may be missing. The first fault ends the run with status 1.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.config.choices import DType
from megatron_multiverse.dtypes import DTYPES
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference import Engine, Request, Result, training_row
from megatron_multiverse.inference.bench_blocks import silence_tags
from megatron_multiverse.inference.bench_model import random_model, random_prompt
from megatron_multiverse.inference.bench_script import VOCAB, block_header
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.device import choose_device, device_name
from megatron_multiverse.model.families import preset

CHECK_PAGES_EVERY = 200
"""Steps between checks of who owns which page."""


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """What runs, and for how long."""

    seconds: float = 600.0
    """Of load; what is in work then is served to its end."""
    batch: int = 128
    """Requests in work at any time."""
    rows: int = 256
    """Branches in a step."""
    model_preset: str = "qwen2.5-0.5b"
    """Published shape; model/families.py lists them."""
    num_layers: int | None = 4
    """Fewer layers than it has, so that more steps run; None for all."""
    dtype: DType = "float32"
    """Of weights and cache. What differs by rounding alone counts as equal: see `tolerance`."""
    tolerance: float = 2e-3
    """Most that a log-probability may be off."""
    cache: float = 0.25
    """Pages, as a share of what all requests in work would take at their longest."""
    cancelled: float = 0.02
    """Share of the requests that are cancelled while they run."""
    seed: int = 0
    """Of the requests."""
    output: Path | None = None
    """JSON file for the report."""


LONGEST_PROMPT, MOST_PATHS, LONGEST_PATH, LONGEST_CONCLUSION = 200, 6, 80, 60


class Soak:
    """The engine, its requests and what was found.

    Args:
        config: what runs.
    """

    def __init__(self, config: SoakConfig) -> None:
        self.config, self.rng = config, random.Random(config.seed)
        shape = preset(config.model_preset)
        if config.num_layers:
            shape = dataclasses.replace(shape, num_layers=config.num_layers)
        self.shape, self.device = shape, choose_device("auto")
        self.model: nn.Module = random_model(shape, DTYPES[config.dtype], self.device)
        silence_tags(self.model)
        longest = LONGEST_PROMPT + LONGEST_CONCLUSION + MOST_PATHS * (LONGEST_PATH + 32) + 64
        pages = int(config.cache * config.batch * longest / 16)
        sizes = EngineConfig(num_pages=max(pages, longest // 8), max_rows=config.rows)
        self.engine = Engine(self.model, VOCAB, sizes, vocab_size=shape.vocab_size, max_position=1 << 20)
        self.requests: dict[int, Request] = {}
        self.to_cancel: dict[int, int] = {}
        self.counts: Counter[str] = Counter()
        self.off = self.below_best = 0.0

    def run(self) -> dict[str, Any]:
        """Load, drain, report.

        Raises:
            GenerationError: a wrong token, or a page that nobody gave back.
        """
        start = last = time.perf_counter()
        while (now := time.perf_counter()) < start + self.config.seconds or self.requests:
            while now < start + self.config.seconds and len(self.requests) < self.config.batch:
                self.add()
            for result in self.engine.step():
                self.check(result)
            for request_id in [k for k, step in self.to_cancel.items() if step <= self.engine.num_steps]:
                self.engine.cancel(request_id)
                del self.to_cancel[request_id]
            self.counts["most_rows"] = max(self.counts["most_rows"], len(self.engine.scheduler.places.nodes))
            if self.engine.num_steps % CHECK_PAGES_EVERY == 0:
                self.engine.scheduler.places.check_integrity()
            if now > last + 30:
                last = now
                print(f"{now - start:5.0f} s: {self.summary()}", flush=True)
        book = self.engine.book
        book.check_integrity([])
        if book.available != book.num_pages:
            raise GenerationError(f"{book.num_pages - book.available} of {book.num_pages} pages were not given back")
        return self.report(time.perf_counter() - start)

    def add(self) -> None:
        """One more request, unlike the others."""
        rng, paths = self.rng, self.rng.randint(1, MOST_PATHS)
        header = block_header(paths)
        path = rng.randint(2, LONGEST_PATH)
        sampling = SamplingParams(
            max_tokens=len(header) + paths * (path + 16) + rng.randint(16, LONGEST_CONCLUSION),
            branch_max_tokens=path,
            temperature=rng.choice([0.0, 0.8]),
            seed=rng.randrange(1 << 31),
            ignore_eos=True,
            max_concurrent_branches=rng.choice([None, None, None, 2]),
        )
        prompt = random_prompt(rng.randint(1, LONGEST_PROMPT), self.shape, rng.randrange(1 << 31))
        request = Request(prompt_ids=prompt, sampling=sampling, answer_start=header)
        number = self.engine.add_request(request)
        self.requests[number] = request
        if rng.random() < self.config.cancelled:
            self.to_cancel[number] = self.engine.num_steps + rng.randint(1, 200)

    @torch.no_grad()
    def check(self, result: Result) -> None:
        """One forward pass over an answer beside what the engine told of it."""
        request = self.requests.pop(result.request_id)
        self.to_cancel.pop(result.request_id, None)
        if result.error or (result.finish_reason != "abort" and not result.blocks):
            raise GenerationError(f"request {result.request_id} ended with {result.finish_reason}: {result.error}")
        row = training_row(result, VOCAB)
        layout, ids = row.sample.layout, torch.from_numpy(row.sample.ids)[None].to(self.device)
        params = LayoutParams.from_labels(torch.from_numpy(layout.r)[None].long().to(self.device), backend="dense")
        positions = torch.from_numpy(layout.position_ids)[None].long().to(self.device)
        logits = self.model(ids, positions, None, packed_seq_params=params)[0, :, : self.shape.vocab_size].float()
        drawn = torch.from_numpy(row.drawn).nonzero()[:, 0]
        prompt = len(result.prompt_ids)
        parents = prompt + torch.tensor(result.parents, dtype=torch.int64)[drawn - prompt]
        seen = logits[parents.to(self.device)].log_softmax(-1)
        own = seen.gather(1, ids[0, drawn.to(self.device)][:, None])[:, 0]
        told = torch.from_numpy(row.logprobs)[drawn].to(self.device)
        off = float((own - told).abs().max()) if len(drawn) else 0.0
        below = float((seen.amax(1) - own).max()) if len(drawn) and request.sampling.temperature == 0 else 0.0
        self.off, self.below_best = max(self.off, off), max(self.below_best, below)
        if not max(off, below) < self.config.tolerance:
            raise GenerationError(
                f"a wrong token in {request}: log-probability off by {off:.2e}, {below:.2e} below the best"
            )
        self.counts["answers"] += 1
        self.counts["tokens"] += len(result.token_ids)
        self.counts["checked_tokens"] += len(drawn)
        self.counts["forks"] += len(result.blocks)
        self.counts["aborted"] += result.finish_reason == "abort"
        self.counts["preemptions"] += result.preemptions

    def summary(self) -> str:
        """One line."""
        counts = ", ".join(f"{value:,} {name}" for name, value in self.counts.items())
        return f"{self.engine.num_steps:,} steps, {counts}, off by at most {self.off:.1e}"

    def report(self, seconds: float) -> dict[str, Any]:
        """All figures."""
        graphs = self.engine.runner.graphs
        config = {name: value for name, value in dataclasses.asdict(self.config).items() if name != "output"}
        found = {"steps": self.engine.num_steps, "graph_steps": graphs.replays if graphs else 0, "missing_pages": 0}
        worst = {"logprob_off": self.off, "greedy_below_best": self.below_best}
        return {"device": device_name(self.device), **config, "ran_seconds": seconds, **found, **self.counts, **worst}


def main() -> None:
    """Run and write the report."""
    config = parse_options(SoakConfig)
    soak = Soak(config)
    report = soak.run()
    print(soak.summary())
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_tool(main)
