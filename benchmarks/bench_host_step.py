"""Host time of a decode step: everything the engine does around the model call.

    python benchmarks/bench_host_step.py --rows 32 --context 4096

A model that computes nothing, over a small vocabulary, stands in for the real one: what is left is planning, uploading,
sampling and committing. On a GPU this runs beside the kernels at best, and what exceeds them is lost. Prints the median
milliseconds per step, and the same with what the CPU reference of tree_decode prepares once per step.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.inference import Engine, Request
from megatron_multiverse.kernels.tree_decode import group_rows
from megatron_multiverse.structure import TAGS, StructureVocab

VOCAB_SIZE = 128
PIECES = [*TAGS, "\n", *"0123456789", ".", ":"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is decoded."""

    rows: int = 32
    """Requests that decode at once."""
    context: int = 4096
    """Tokens of each prompt."""
    steps: int = 200
    """Decode steps to time."""
    page_size: int = 16
    """Tokens per page."""
    temperature: float = 0.0
    """0 is greedy."""


class NoModel(nn.Module):
    """Attends to nothing and always says the same; counts the time spent in it."""

    def __init__(self, prepare: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_layers=1, num_query_groups=1, kv_channels=1)
        self.max_sequence_length, self.vocab_size = 1 << 20, VOCAB_SIZE
        self.weight = nn.Parameter(torch.zeros(1))
        self.row = torch.zeros(VOCAB_SIZE)
        self.row[100] = 1.0  # plain text
        self.prepare = prepare
        self.seconds = 0.0

    def __call__(self, input_ids: Tensor, *_: Any, packed_seq_params: Any) -> Tensor:
        """Logits [1, n, vocab]."""
        start = time.perf_counter()
        logits = self.row.expand(1, input_ids.shape[1], -1)
        self.seconds += time.perf_counter() - start
        if self.prepare:
            plan = packed_seq_params.plan
            group_rows(plan.pages, plan.lengths, plan.borders, packed_seq_params.store.keys.shape[2])
        return logits


def measure(options: Options, *, prepare: bool = False) -> float:
    """Median milliseconds per decode step outside of the model."""
    model = NoModel(prepare)
    tokens = options.context + options.steps + 16
    pages = options.rows * (-(-tokens // options.page_size) + 1)
    vocab = StructureVocab.from_pieces(PIECES, eos_id=len(PIECES))
    engine = Engine(model, vocab, EngineConfig(num_pages=pages, page_size=options.page_size, max_rows=options.rows))
    for row in range(options.rows):
        sampling = SamplingParams(max_tokens=options.steps + 8, temperature=options.temperature, ignore_eos=True)
        engine.add_request(Request(prompt_ids=[50 + row] * options.context, sampling=sampling, sample=row))
    while (
        any(len(state.root.ids) == state.root.prompt_length for state in engine.scheduler.active)
        or engine.scheduler.waiting
    ):
        engine.step()  # the prompts
    times = []
    for _ in range(options.steps):
        inside, start = model.seconds, time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start - (model.seconds - inside))
    return 1000 * statistics.median(times)


def main() -> None:
    options = parse_options(Options)
    torch.set_num_threads(1)
    print(f"{options.rows} rows x {options.context} tokens, pages of {options.page_size}:")
    print(f"  around the model   {measure(options):.3f} ms per step")
    print(f"  and the reference's preparation   {measure(options, prepare=True):.3f} ms per step")


if __name__ == "__main__":
    run_tool(main)
