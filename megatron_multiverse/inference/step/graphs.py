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
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_multiverse.inference.step.forward import KVStore, PagedForward, StepTensors, known_ids
from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.inference.step.sampler import CounterSampler, DeviceSampling, Sampler, choose, pack
from megatron_multiverse.kernels.device import processors
from megatron_multiverse.kernels.tree_decode import (
    LONGEST_LISTED,
    DeviceWork,
    Work,
    divide_work,
    most_parts,
    most_sharers,
)

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Tokens of the graphs; a step takes the next larger one."""
MOST_MIXED = 128
"""Tokens of a step beyond which a row that brings more than `LONGEST_LISTED` of them keeps it from being a graph: call
by call, flash attention reads its keys less often."""
MOST_PAGES = 4096
"""Pages per token that a graph has room for, those that rows share counted once; steps that need more run without."""


@dataclass(frozen=True)
class _Kind:
    """What a graph is made for: tokens, attention's queries per item and parts per query, how tokens are drawn."""

    size: int
    sharers: int
    slots: int
    draw: str
    """greedy, noise, or logits: the caller draws."""


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
        self.page_size, self.kv_heads = store.keys.shape[2:4]
        self.sharers = most_sharers(forward.num_heads, self.kv_heads)
        self.processors = processors(store.keys.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[_Kind, _Graph] = {}
        self.replays = 0

    def prepare(self, plan: StepPlan, sampler: Sampler) -> Callable[[], Tensor] | None:
        """Upload a step; None if it does not fit a graph.

        Returns:
            What replays it and gives tokens and log-probabilities as `pack` puts them, of at least the sampled rows.

        A `CounterSampler` draws inside of the graph, unless a row asks for more than a temperature (`Shaping`).
        """
        n = len(plan.ids)
        size = next((size for size in SIZES if size >= n), None)
        if size is None or len(plan.write_slots) > _writes(size):
            return None
        if n > MOST_MIXED and np.diff(plan.borders).max() > LONGEST_LISTED:
            return None
        work = divide_work(
            plan.pages,
            plan.lengths,
            plan.borders,
            page_size=self.page_size,
            kv_heads=self.kv_heads,
            processors=self.processors,
            slots=most_parts(size),
            sharers=self.sharers,
        )
        if len(work.items) > self._items(size) or work.pages.size > size * MOST_PAGES:
            return None
        kind = _Kind(size, work.tokens.shape[1], work.slots, _draw(plan, sampler))
        graph = self.graphs.get(kind) or self._capture(kind)
        graph.fill(plan, work)
        return partial(self._replay, graph, plan, sampler)

    def _replay(self, graph: _Graph, plan: StepPlan, sampler: Sampler) -> Tensor:
        graph.graph.replay()
        self.replays += 1
        if graph.kind.draw != "logits":
            return graph.result
        return choose(graph.result[: len(plan.sample), : self.vocab_size], plan.sampling, sampler, self.last_tokens)

    def _items(self, size: int) -> int:
        return 3 * size + 2 * self.processors // self.kv_heads + 8

    def _capture(self, kind: _Kind) -> _Graph:
        start, before = time.perf_counter(), torch.cuda.mem_get_info()[0]
        graph = _Graph(kind, self._items(kind.size), self._step(kind), self.pool, self.store.keys.device)
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
    if type(sampler) is not CounterSampler or sampling.shaping is not None:
        return "logits"
    return "noise" if sampling.temperature.any() else "greedy"


def _writes(size: int) -> int:
    """Slots that a step of a graph may write: some tokens are written to several, most where paths begin."""
    return 3 * size + 16


class _Graph:
    """One captured graph and the tensors it reads."""

    def __init__(
        self,
        kind: _Kind,
        items: int,
        step: Callable[[StepTensors, Tensor, DeviceSampling], Tensor],
        pool: Any,
        device: torch.device,
    ) -> None:
        self.kind, size = kind, kind.size
        buffer = _Buffer(
            {
                "ids": (np.int64, (size,)),
                "sources": (np.int64, (size,)),
                "positions": (np.int64, (size,)),
                "logit_tokens": (np.int64, (size,)),
                "write_slots": (np.int64, (_writes(size),)),
                "write_tokens": (np.int64, (_writes(size),)),
                "keys": (np.int64, (size,)),
                "indices": (np.int64, (size,)),
                "temperature": (np.float64, (size,)),
                "items": (np.int32, (items, 4)),
                "tokens": (np.int32, (items, kind.sharers)),
                "limits": (np.int32, (items, kind.sharers)),
                "counts": (np.int32, (size,)),
                "pages": (np.int32, (size * MOST_PAGES,)),
            },
            device,
        )
        self.buffer, there = buffer, buffer.device
        work = DeviceWork(there["pages"], there["items"], there["tokens"], there["limits"], there["counts"], kind.slots)
        tensors = StepTensors(
            there["ids"],
            there["positions"],
            there["logit_tokens"],
            there["write_slots"],
            there["write_tokens"],
            work,
        )
        sampling = DeviceSampling(there["keys"], there["indices"], there["temperature"])
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

    def fill(self, plan: StepPlan, work: Work) -> None:
        """Write a plan where the graph reads it."""
        host = self.buffer.host
        for name in ("ids", "positions", "write_tokens"):
            _pad(host[name], getattr(plan, name), 0)
        _pad(host["sources"], plan.sources, -1)
        _pad(host["write_slots"], plan.write_slots, -1)
        _pad(host["logit_tokens"], plan.borders[1:][plan.sample] - 1, 0)
        for name in ("keys", "indices", "temperature"):
            _pad(host[name], getattr(plan.sampling, name), 0)
        for name in ("items", "tokens", "limits", "counts"):
            _pad(host[name], getattr(work, name), 0)
        host["pages"][: work.pages.size] = work.pages
        self.buffer.upload(leave_out=host["pages"].nbytes - work.pages.nbytes)


def _pad(target: npt.NDArray[np.generic], values: npt.NDArray[np.generic], fill: int) -> None:
    target[: len(values)] = values
    target[len(values) :] = fill


class _Buffer:
    """Arrays side by side, on the host (pinned) and on the device; one copy brings all of them over.

    There are two on the host, in turns: the copy of one step may still wait for the GPU when the next one is written.
    """

    def __init__(self, fields: dict[str, tuple[type[np.generic], tuple[int, ...]]], device: torch.device) -> None:
        parts: dict[str, slice] = {}
        total = 0
        for name, (dtype, shape) in fields.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            parts[name] = slice(total, total + size)
            total += -(-size // 8) * 8  # so that every array begins where its numbers may stand
        self._hosts = [torch.zeros(total, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        self._turn = 0
        self._views: list[dict[str, npt.NDArray[np.generic]]] = [{}, {}]
        self.device: dict[str, Tensor] = {}
        for name, (dtype, shape) in fields.items():
            for views, host in zip(self._views, self._hosts, strict=True):
                views[name] = host[parts[name]].numpy().view(dtype).reshape(shape)
            self.device[name] = self._device[parts[name]].view(torch.from_numpy(np.empty(0, dtype)).dtype).view(shape)

    @property
    def host(self) -> dict[str, npt.NDArray[np.generic]]:
        """The arrays that the next `upload` brings over."""
        return self._views[self._turn]

    def upload(self, leave_out: int = 0) -> None:
        """Copy to the device, without the last `leave_out` bytes."""
        end = len(self._device) - leave_out
        self._device[:end].copy_(self._hosts[self._turn][:end], non_blocking=True)
        self._turn = 1 - self._turn
