"""Host time of a decode step: everything the engine does around the model call.

    python benchmarks/bench_host_step.py --rows 32 --context 4096

A model that computes nothing, over a small vocabulary, stands in for the real one: what is left is planning, uploading,
sampling and committing. On a GPU this runs beside the kernels at best, and what exceeds them is lost. Prints the median
milliseconds per step, and the same with what attention prepares once per step on a CPU and on a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.inference import Engine, Request
from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.inference.step.runner import PendingOutput
from megatron_multiverse.kernels.tree_decode import divide_work, group_rows, most_parts, most_sharers
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
    overlap: bool = True
    """Plan each step before the tokens of the one before it are taken, as on a GPU."""


class NoModel(nn.Module):
    """Attends to nothing and always says the same; counts the time spent in it."""

    def __init__(self, vocab_size: int = VOCAB_SIZE) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_layers=1, num_query_groups=1, kv_channels=1)
        self.max_sequence_length, self.vocab_size = 1 << 20, vocab_size
        self.weight = nn.Parameter(torch.zeros(1))
        self.row = torch.zeros(vocab_size)
        self.row[100] = 1.0  # plain text
        self.seconds = 0.0

    def __call__(self, input_ids: Tensor, *_: Any, packed_seq_params: Any) -> Tensor:
        """Logits [1, n, vocab]."""
        start = time.perf_counter()
        logits = self.row.expand(1, input_ids.shape[1], -1)
        self.seconds += time.perf_counter() - start
        return logits


HEADS, KV_HEADS, WEIGHTS, PROCESSORS = 28, 4, 6_525_000_000, 132
"""Of Qwen2.5-7B and of an H100: what a list of work is made for."""


def rectangles(plan: StepPlan, page_size: int) -> None:
    """What attention on a CPU prepares once per step."""
    group_rows(plan.pages, plan.lengths, plan.borders, page_size, KV_HEADS)


def work_list(plan: StepPlan, page_size: int) -> None:
    """What attention on a GPU prepares once per step."""
    divide_work(
        plan.pages,
        plan.lengths,
        plan.borders,
        page_size=page_size,
        kv_heads=KV_HEADS,
        processors=PROCESSORS,
        slots=most_parts(len(plan.ids)),
        sharers=most_sharers(HEADS, KV_HEADS),
    )


def measure(options: Options, prepare: Callable[[StepPlan, int], None] | None = None) -> float:
    """Median milliseconds per decode step outside of the model, with what `prepare` does to its plan."""
    model = NoModel()
    tokens = options.context + options.steps + 16
    pages = options.rows * (-(-tokens // options.page_size) + 1)
    vocab = StructureVocab.from_pieces(PIECES, eos_id=len(PIECES))
    config = EngineConfig(
        num_pages=pages,
        page_size=options.page_size,
        max_rows=options.rows,
        max_step_tokens=options.rows * options.context,  # all prompts in one step
        overlap=options.overlap,
    )
    engine = Engine(model, vocab, config)
    launch = engine.runner.launch

    def prepared(plan: StepPlan, replay: Callable[[], Tensor] | None = None) -> PendingOutput:
        if prepare is not None:
            prepare(plan, options.page_size)
        return launch(plan, replay)

    engine.runner.launch = prepared  # type: ignore[method-assign]
    for row in range(options.rows):
        sampling = SamplingParams(max_tokens=options.steps + 8, temperature=options.temperature, ignore_eos=True)
        salt = str(row)  # no two share pages
        engine.add_request(Request(prompt_ids=[100] * options.context, sampling=sampling, sample=row, cache_salt=salt))
    while engine.scheduler.waiting or any(state.root.in_prompt for state in engine.scheduler.active):
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
    print(f"  and the rectangles of a CPU   {measure(options, rectangles):.3f} ms per step")
    print(f"  and the list of work of a GPU   {measure(options, work_list):.3f} ms per step")


if __name__ == "__main__":
    run_tool(main)
