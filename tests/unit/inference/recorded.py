"""`StepGraphs` without a GPU: what a graph would replay is called again, over the same tensors, and attention reads
what its list of work and its segments say, query by query."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from megatron_multiverse.inference import Engine
from megatron_multiverse.inference.step import forward
from megatron_multiverse.inference.step.forward import PagedForward
from megatron_multiverse.inference.step.graphs import Recorder, StepGraphs
from megatron_multiverse.inference.step.runner import PendingOutput
from megatron_multiverse.kernels import kv_write, tree_decode
from megatron_multiverse.kernels.kv_write import write_kv_reference
from megatron_multiverse.kernels.tree_decode import DeviceSegments, DeviceWork, Segments, Work
from tests.unit.kernels.listed_keys import prompt_reads, reads


class CallsAgain(Recorder):
    """Stands in for CUDA graphs. Results keep their place, as those of graphs do."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See `Recorder`."""
        result = call()
        result.fill_(-1)

        def replay() -> None:
            result.copy_(call())

        return replay, result

    def free_bytes(self) -> int:
        """None is counted."""
        return 0


def attend(
    out: Tensor, query: Tensor, keys: Tensor, values: Tensor, scale: float, found: Iterable[tuple[int, Any]]
) -> None:
    """Write what queries attend to; `found`: pairs of a query and slots that it reads, as many as there are parts."""
    slots: dict[int, list[npt.NDArray[np.int64]]] = {}
    for token, some in found:
        slots.setdefault(token, []).append(some)
    keys, values = (x.flatten(0, 1).repeat_interleave(query.shape[1] // x.shape[2], 1) for x in (keys, values))
    for token, parts in slots.items():
        seen = torch.from_numpy(np.concatenate(parts))
        if len(seen):
            weights = torch.einsum("hd,khd->hk", query[token], keys[seen]).mul(scale).softmax(-1)
            out[token] = torch.einsum("hk,khd->hd", weights, values[seen])


def _attend_by_list(
    self: DeviceWork, query: Tensor, keys: Tensor, values: Tensor, softmax_scale: float, *, out: Tensor | None = None
) -> Tensor:
    arrays = (x.numpy() for x in (self.items, self.tokens, self.limits, self.tails, self.counts, self.pages))
    found = ((token, slots) for token, slots, _ in reads(Work(*arrays, slots=self.slots), keys.shape[1]))
    out = torch.full_like(query, float("nan")) if out is None else out
    attend(out, query, keys, values, softmax_scale, found)
    return out


def _attend_by_segments(
    query: Tensor, keys: Tensor, values: Tensor, segments: DeviceSegments, softmax_scale: float
) -> Tensor:
    out = torch.full_like(query, float("nan"))
    there = segments.borders[1:] > segments.borders[:-1]  # behind the last one there is room for others
    count = int(there.sum())
    assert not there[count:].any()
    arrays = (segments.borders[: count + 1], segments.begins[: count + 1], segments.seen[:count], segments.slots)
    attend(out, query, keys, values, softmax_scale, prompt_reads(Segments(*(x.numpy() for x in arrays))))
    return out


def _write_kv(
    mixed: Tensor, table: Tensor, keys: Tensor, values: Tensor, slots: Tensor, tokens: Tensor | None, **norms: Any
) -> Tensor:
    if tokens is None:  # a step that fits no graph
        return write_kv_reference(mixed, table, keys, values, slots, tokens, **norms)
    there = slots >= 0
    return write_kv_reference(mixed, table, keys, values, slots[there], tokens[there], **norms)


_fetch = PendingOutput.fetch


def _fetch_copy(self: PendingOutput, packed: Tensor, rows: int, scores: Tensor | None = None) -> PendingOutput:
    """From a GPU a copy comes over; the next step writes to the same place."""
    return _fetch(self, packed.clone(), rows, scores)


def record_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> StepGraphs:
    """Let an engine over a GPTModel on a CPU run its steps as one on a GPU does."""
    monkeypatch.setattr(DeviceWork, "__call__", _attend_by_list)
    monkeypatch.setattr(tree_decode, "attend_segments", _attend_by_segments)
    for module in (forward, kv_write):
        monkeypatch.setattr(module, "write_kv", _write_kv)
    monkeypatch.setattr(PendingOutput, "fetch", _fetch_copy)
    runner = engine.runner
    assert isinstance(runner.forward, PagedForward)
    runner.graphs = StepGraphs(runner.forward, runner.store, runner.last_tokens, runner.vocab_size, CallsAgain())
    runner.graphs.sizes.most_prompt_tokens = 4096  # whatever the dtype
    return runner.graphs
