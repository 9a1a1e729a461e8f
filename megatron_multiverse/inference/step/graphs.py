"""CUDA graphs of steps: one launch instead of some three hundred, one upload instead of a dozen.

A graph replays the forward pass and the draw for a fixed number of tokens, over tensors that stay where they are. A
plan is written into a pinned buffer and travels in one copy, or not at all: most steps are what the graph has made of
the one before (`kernels/decode_step`). Tokens that the step does not have write nothing and are dropped. Every token
counts as one, whether it is drawn, forced or part of a prompt, so the steps in which forks and joins happen take the
same path. Which graph a step fits: `graph_sizes.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_multiverse.inference.step.forward import KVStore, PagedForward, StepTensors
from megatron_multiverse.inference.step.graph_sizes import ROWS, GraphSizes, Kind
from megatron_multiverse.inference.step.plan import Floats, StepPlan
from megatron_multiverse.inference.step.plan_buffer import PlanBuffer
from megatron_multiverse.inference.step.sampler import CounterSampler, DeviceSampling, Sampler, choose
from megatron_multiverse.kernels.decode_step import Moving, end_step
from megatron_multiverse.kernels.device import processors
from megatron_multiverse.kernels.sampling import Filters
from megatron_multiverse.kernels.tree_decode import Attention, DeviceSegments, DeviceWork, Mixed, takes_segments

logger = logging.getLogger(__name__)

MOST_GRAPHS = 256
"""Graphs that are kept; beyond them the one that was not used for longest is dropped, and captured again when it is
needed. Each takes some MiB, and what a server is asked over weeks comes to several times as many."""


class Recorder:
    """Records a call as a CUDA graph; all graphs of one recorder share the memory of what is not kept.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What replays the call, over the same tensors, and where its result stands then."""
        # The first call compiles and chooses; it must not be recorded.
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: NCCL's asks whether earlier sums are done, which must not end the capture.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = call()
        return graph.replay, result

    def free_bytes(self) -> int:
        """Memory of the device that nothing uses."""
        return torch.cuda.mem_get_info(self.device)[0]


class StepGraphs:
    """Runs steps by graphs, each captured when it is first needed.

    Args:
        forward: the model.
        store: its cache, on a CUDA device.
        last_tokens: int64, the tokens that the previous step drew, at an address that stays.
        vocab_size: ids of the tokenizer, or None for all the model has.
        recorder: of graphs; by default one for the store's device.
    """

    def __init__(
        self,
        forward: PagedForward,
        store: KVStore,
        last_tokens: Tensor,
        vocab_size: int | None,
        recorder: Recorder | None = None,
    ) -> None:
        self.forward, self.store, self.vocab_size = forward, store, vocab_size
        self.last_tokens = last_tokens
        page_size, kv_heads, head_dim = store.keys.shape[2:]
        self.sizes = GraphSizes(
            page_size=page_size,
            heads=forward.num_heads,
            kv_heads=kv_heads,
            processors=processors(store.keys.device),
            weights=forward.num_product_weights,
            segments=takes_segments(store.keys.dtype, head_dim),
        )
        self.recorder = recorder or Recorder(store.keys.device)
        self.graphs: dict[Kind, _Graph] = {}
        self.replays = 0
        self._logits: dict[int, Tensor] = {}
        self._temperature: Floats | None = None
        self._noise = False
        self._last: tuple[_Graph, StepPlan] | None = None  # what was replayed last, if nothing was uploaded since

    def prepare(self, plan: StepPlan, sampler: Sampler) -> Callable[[], Tensor] | None:
        """Upload a step; None if it does not fit a graph.

        Returns:
            What replays it and gives tokens and log-probabilities as `pack` puts them, of at least the sampled rows.
            The tokens are also written to `last_tokens`.

        A `CounterSampler` draws inside of the graph, unless a row asks for more than a temperature and filters. Where
        all rows go on by a token, the graph that was replayed last has made its arrays those of this step.
        """
        draw = self._draw(plan, sampler)
        if plan.moved_from is not None and self._last is not None:
            graph, last = self._last
            if plan.moved_from is last.lengths and graph.kind.draw == draw and graph.buffer.moves:
                return partial(self._replay, graph, plan, sampler)
        fit = self.sizes.fit(plan, draw)
        if fit is None:
            return None
        self._last = None
        graph = self.graphs.get(fit.kind) or self._capture(fit.kind)
        graph.buffer.fill(plan, fit)
        return partial(self._replay, graph, plan, sampler)

    def _draw(self, plan: StepPlan, sampler: Sampler) -> str:
        """See `Kind.draw`."""
        sampling = plan.sampling
        if type(sampler) is not CounterSampler or not (sampling.shaping is None or sampling.shaping.only_filters):
            return "logits"
        if sampling.temperature is not self._temperature:  # most steps have that of the one before
            self._temperature, self._noise = sampling.temperature, bool(sampling.temperature.any())
        return "noise" if self._noise else "greedy"

    def _replay(self, graph: _Graph, plan: StepPlan, sampler: Sampler) -> Tensor:
        graph.replay()
        self._last = graph, plan
        graph.last_use = self.replays = self.replays + 1
        if graph.kind.draw != "logits":
            return graph.result
        rows = len(plan.sample)
        packed = choose(graph.result[:rows, : self.vocab_size], plan.sampling, sampler, self.last_tokens)
        self.last_tokens[:rows] = packed[0]
        return packed

    def _capture(self, kind: Kind) -> _Graph:
        if len(self.graphs) >= MOST_GRAPHS:  # not by free memory, which ranks that share a model have each its own of
            del self.graphs[min(self.graphs, key=lambda old: self.graphs[old].last_use)]
        start, before = time.perf_counter(), self.recorder.free_bytes()
        drawn = self.last_tokens[: kind.rows].clone()  # the first call writes there
        graph = _Graph(kind, self._step, self.recorder)
        self.last_tokens[: kind.rows] = drawn
        graph.last_use = self.replays
        self.graphs[kind] = graph
        logger.info(
            "CUDA graph for %d tokens (%s) in %.2f s, %.0f MiB",
            kind.size,
            kind.draw + ", prompts" * (kind.keys > 0) + ", shared prefixes" * (kind.sharers > 1),
            time.perf_counter() - start,
            (before - self.recorder.free_bytes()) / 2**20,
        )
        return graph

    def _step(self, kind: Kind, there: dict[str, Tensor]) -> Callable[[], Tensor]:
        """What a graph does with the arrays that it reads."""
        tensors = StepTensors(
            there["ids"],
            there["positions"],
            there["logit_tokens"],
            there["write_slots"],
            there["write_tokens"],
            _attention(kind, there),
            there["sources"],
            self.last_tokens,
        )
        filters = Filters(there["top_k"], there["top_p"], there["min_p"])
        sampling = DeviceSampling(there["keys"], there["indices"], there["temperature"], filters)
        moving = None if kind.keys else Moving(*(there[name] for name in Moving._fields))

        def step() -> Tensor:
            logits = self.forward(tensors, self.store)
            assert logits is not None  # pipeline stages run without graphs
            drawn = None
            if kind.draw != "logits":
                drawn = sampling.draw(logits[:, : self.vocab_size], noise=kind.draw == "noise")
            packed = end_step(drawn, self.last_tokens, moving, self.store.keys.shape[2])
            return self._kept(logits) if packed is None else packed

        return step

    def _kept(self, logits: Tensor) -> Tensor:
        """The logits where those of all graphs stand, one step's after another's: each graph's own would be 150 MiB for
        512 rows of 152,000 ids."""
        room = next((rows for rows in ROWS if rows >= len(logits)), len(logits))
        if room not in self._logits:  # in the first call, which is not recorded
            self._logits[room] = logits.new_empty(room, logits.shape[1])
        return self._logits[room][: len(logits)].copy_(logits)


class _Graph:
    """One captured graph and the tensors it reads."""

    def __init__(
        self,
        kind: Kind,
        step: Callable[[Kind, dict[str, Tensor]], Callable[[], Tensor]],
        recorder: Recorder,
    ) -> None:
        self.kind = kind
        self.last_use = 0
        """Replays of all graphs when this one was replayed last."""
        self.buffer = buffer = PlanBuffer(kind, recorder.device)
        buffer.host["write_slots"][:] = -1
        buffer.upload()
        self.replay, self.result = recorder.record(step(kind, buffer.device))


def _attention(kind: Kind, there: dict[str, Tensor]) -> Attention:
    """Over the arrays of a buffer."""

    def taken(*names: str) -> list[Tensor]:
        return [there[name] for name in names]

    work = DeviceWork(*taken("pages", "items", "tokens", "limits", "tails", "counts", "shares"), kind.slots)
    if not kind.keys:
        return work
    segments = DeviceSegments(*taken("segment_borders", "segment_begins", "segment_seen", "prompt_slots"))
    return Mixed(segments, (), work if kind.items else None)
