"""CUDA graphs of small steps: one launch instead of some three hundred, one upload instead of a dozen.

A graph replays the forward pass and the draw for a fixed number of tokens, over tensors that stay where they are. A
plan is written into a pinned buffer and travels in one copy; tokens that the step does not have write nothing and are
dropped. Every token counts as one, whether it is drawn, forced or part of a short prompt, so the steps in which forks
and joins happen take the same path.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_multiverse.inference.step.forward import KVStore, PagedForward, StepTensors, known_ids
from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.inference.step.plan_buffer import PlanBuffer, most_pages, most_writes, room_for_items
from megatron_multiverse.inference.step.sampler import CounterSampler, DeviceSampling, Sampler, choose, pack
from megatron_multiverse.kernels.device import processors
from megatron_multiverse.kernels.sampling import Filters
from megatron_multiverse.kernels.tree_decode import (
    LONGEST_LISTED,
    DeviceWork,
    SuccessiveWork,
    Work,
    most_parts,
    most_sharers,
)

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Tokens of the graphs; a step takes the next larger one."""
MOST_MIXED, MOST_SEEN = 128, 1 << 18
"""A step of more tokens than the first, some of whose rows bring more than `LONGEST_LISTED`, is a graph if those see
at most so many keys, added up over their tokens. Call by call, flash attention reads the keys of a long prompt less
often; a short one is done before the host has launched it so."""


@dataclass(frozen=True)
class _Kind:
    """What a graph is made for: tokens, items of attention, their queries and parts per query, how tokens are drawn."""

    size: int
    items: int
    sharers: int
    slots: int
    draw: str
    """greedy, noise, or logits: the caller draws."""


class GraphSizes:
    """Which graph a step fits; the part of `StepGraphs` that needs no GPU.

    Args:
        page_size: keys per page.
        heads: query heads.
        kv_heads: key/value heads.
        processors: multiprocessors of the GPU.
    """

    def __init__(self, *, page_size: int, heads: int, kv_heads: int, processors: int) -> None:
        self.kv_heads, self.processors = kv_heads, processors
        self.work = SuccessiveWork(
            page_size=page_size, kv_heads=kv_heads, processors=processors, sharers=most_sharers(heads, kv_heads)
        )

    def fit(self, plan: StepPlan) -> tuple[int, int, Work] | None:
        """(tokens, items, the list of work) of the smallest graph for a step; None: it runs without."""
        n = len(plan.ids)
        size = next((size for size in SIZES if size >= n), None)
        if size is None or len(plan.write_slots) > most_writes(size):
            return None
        if n > MOST_MIXED:
            counts = np.diff(plan.borders)
            if (counts * plan.lengths)[counts > LONGEST_LISTED].sum() > MOST_SEEN:
                return None
        work = self.work.divide(plan.pages, plan.lengths, plan.borders, most_parts(size))
        items = room_for_items(work, size, self.processors, self.kv_heads)
        return None if items is None or work.pages.size > most_pages(size) else (size, items, work)


class StepGraphs:
    """Runs small steps by graphs, each captured when it is first needed.

    Args:
        forward: the model.
        store: its cache, on a CUDA device.
        last_tokens: int64, the tokens that the previous step drew, at an address that stays.
        vocab_size: ids of the tokenizer, or None for all the model has.
    """

    def __init__(self, forward: PagedForward, store: KVStore, last_tokens: Tensor, vocab_size: int | None) -> None:
        self.forward, self.store, self.vocab_size = forward, store, vocab_size
        self.last_tokens = last_tokens
        page_size, kv_heads = store.keys.shape[2:4]
        self.sizes = GraphSizes(
            page_size=page_size,
            heads=forward.num_heads,
            kv_heads=kv_heads,
            processors=processors(store.keys.device),
        )
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[_Kind, _Graph] = {}
        self.replays = 0

    def prepare(self, plan: StepPlan, sampler: Sampler) -> Callable[[], Tensor] | None:
        """Upload a step; None if it does not fit a graph.

        Returns:
            What replays it and gives tokens and log-probabilities as `pack` puts them, of at least the sampled rows.

        A `CounterSampler` draws inside of the graph, unless a row asks for more than a temperature and filters.
        """
        found = self.sizes.fit(plan)
        if found is None:
            return None
        size, items, work = found
        kind = _Kind(size, items, work.tokens.shape[1], work.slots, _draw(plan, sampler))
        graph = self.graphs.get(kind) or self._capture(kind)
        graph.buffer.fill(plan, work)
        return partial(self._replay, graph, plan, sampler)

    def _replay(self, graph: _Graph, plan: StepPlan, sampler: Sampler) -> Tensor:
        graph.graph.replay()
        self.replays += 1
        if graph.kind.draw != "logits":
            return graph.result
        return choose(graph.result[: len(plan.sample), : self.vocab_size], plan.sampling, sampler, self.last_tokens)

    def _capture(self, kind: _Kind) -> _Graph:
        start, before = time.perf_counter(), torch.cuda.mem_get_info()[0]
        graph = _Graph(kind, self._step(kind), self.pool, self.store.keys.device)
        self.graphs[kind] = graph
        logger.info(
            "CUDA graph for %d tokens (%s) in %.2f s, %.0f MiB",
            kind.size,
            kind.draw if kind.sharers == 1 else f"{kind.draw}, shared prefixes",
            time.perf_counter() - start,
            (before - torch.cuda.mem_get_info()[0]) / 2**20,
        )
        return graph

    def _step(self, kind: _Kind) -> Callable[[StepTensors, Tensor, DeviceSampling], Tensor]:
        def step(tensors: StepTensors, sources: Tensor, sampling: DeviceSampling) -> Tensor:
            ids = known_ids(tensors.ids, sources, self.last_tokens)
            logits = self.forward(dataclasses.replace(tensors, ids=ids), self.store)
            assert logits is not None  # pipeline stages run without graphs
            if kind.draw == "logits":
                return logits
            return pack(*sampling.draw(logits[:, : self.vocab_size], noise=kind.draw == "noise"))

        return step


def _draw(plan: StepPlan, sampler: Sampler) -> str:
    """See `_Kind.draw`."""
    sampling = plan.sampling
    if type(sampler) is not CounterSampler or not (sampling.shaping is None or sampling.shaping.only_filters):
        return "logits"
    return "noise" if sampling.temperature.any() else "greedy"


class _Graph:
    """One captured graph and the tensors it reads."""

    def __init__(
        self,
        kind: _Kind,
        step: Callable[[StepTensors, Tensor, DeviceSampling], Tensor],
        pool: Any,
        device: torch.device,
    ) -> None:
        self.kind, size = kind, kind.size
        buffer = PlanBuffer(size, kind.items, kind.sharers, device)
        self.buffer, there = buffer, buffer.device
        work = DeviceWork(
            there["pages"],
            there["items"],
            there["tokens"],
            there["limits"],
            there["tails"],
            there["counts"],
            kind.slots,
        )
        tensors = StepTensors(
            there["ids"],
            there["positions"],
            there["logit_tokens"],
            there["write_slots"],
            there["write_tokens"],
            work,
        )
        filters = Filters(there["top_k"], there["top_p"], there["min_p"])
        sampling = DeviceSampling(there["keys"], there["indices"], there["temperature"], filters)
        buffer.host["write_slots"][:] = -1
        buffer.upload()
        # The first call compiles and chooses; it must not be recorded.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step(tensors, there["sources"], sampling)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: NCCL's asks whether earlier sums are done, which must not end the capture.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.result = step(tensors, there["sources"], sampling)
