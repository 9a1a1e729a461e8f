"""A step's plan as one stretch of bytes, which a CUDA graph reads at an address that stays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_multiverse.inference.step.graph_sizes import Fit, Kind
from megatron_multiverse.inference.step.plan import StepPlan
from megatron_multiverse.kernels.tree_decode import NO_MOVES

_NONE = np.zeros(0)
UPLOAD_UNIT = 8192
"""Bytes of which so many more are uploaded as make a multiple."""


class PlanBuffer:
    """Arrays side by side, on the host (pinned for a GPU) and on the device; one copy brings all of them over.

    There are two on the host, in turns: the copy of one step may still wait for the GPU when the next one is written.

    Args:
        kind: sizes of the arrays.
        device: where the graph reads.
    """

    def __init__(self, kind: Kind, device: torch.device) -> None:
        size, rows, items, sharers = kind.size, kind.rows, kind.items, kind.sharers
        fields: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
            "ids": (np.int64, (size,)),
            "sources": (np.int64, (size,)),
            "positions": (np.int64, (size,)),
            "logit_tokens": (np.int64, (rows,)),
            "write_slots": (np.int64, (kind.writes,)),
            "write_tokens": (np.int64, (kind.writes,)),
            "keys": (np.int64, (rows,)),
            "indices": (np.int64, (rows,)),
            "temperature": (np.float64, (rows,)),
            "top_k": (np.int64, (rows,)),
            "top_p": (np.float64, (rows,)),
            "min_p": (np.float64, (rows,)),
            "items": (np.int32, (items, 4)),
            "tokens": (np.int32, (items, sharers)),
            "limits": (np.int32, (items, sharers)),
            "tails": (np.int32, (items if sharers > 1 else 0, 3, sharers)),
            "counts": (np.int32, (rows,)),
            "shares": (np.int32, (kind.programs + 1 if kind.programs else 0,)),
            "at_end": (np.int32, (items,)),
            "ends": (np.int32, (rows,)),
            "segment_borders": (np.int32, (kind.segments + 1,)),
            "segment_begins": (np.int32, (kind.segments + 1,)),
            "segment_seen": (np.int32, (kind.segments,)),
            "prompt_slots": (np.int32, (kind.keys,)),
            "pages": (np.int32, (kind.pages,)),
        }
        parts: dict[str, slice] = {}
        total = 0
        for name, (dtype, shape) in fields.items():
            length = int(np.prod(shape)) * np.dtype(dtype).itemsize
            parts[name] = slice(total, total + length)
            total += -(-length // 8) * 8  # so that every array begins where its numbers may stand
        self._hosts = [torch.zeros(total, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(2)]
        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        # By their length, since making slices takes as long as the copy that is launched.
        self._slices: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._turn = 0
        # Borders and sampled rows of a plan, and the last tokens of these rows.
        self._logits: tuple[npt.NDArray[np.generic], ...] = (_NONE, _NONE, _NONE)
        # For each host buffer and field the array that was written there last.
        self._written: list[dict[str, npt.NDArray[np.generic]]] = [{}, {}]
        self._views: list[dict[str, npt.NDArray[np.generic]]] = [{}, {}]
        self.moves = False
        """Whether the device can make what was filled in that of a step in which every row has a token more."""
        self.device: dict[str, Tensor] = {}
        for name, (dtype, shape) in fields.items():
            for views, host in zip(self._views, self._hosts, strict=True):
                views[name] = host[parts[name]].numpy().view(dtype).reshape(shape)
            self.device[name] = self._device[parts[name]].view(torch.from_numpy(np.empty(0, dtype)).dtype).view(shape)

    @property
    def host(self) -> dict[str, npt.NDArray[np.generic]]:
        """The arrays that the next `upload` brings over."""
        return self._views[self._turn]

    def fill(self, plan: StepPlan, fit: Fit) -> None:
        """Write a plan and what it attends to, and bring them to the device. Their arrays must not change later: what
        already stands there is not written again, which is most of a step that only adds a token to each row."""
        work, segments, moves = fit.work, fit.segments, fit.moves or NO_MOVES
        self.moves = fit.moves is not None
        sampling, shaping = plan.sampling, plan.sampling.shaping
        self._put(
            ("ids", plan.ids, 0),
            ("sources", plan.sources, -1),
            ("positions", plan.positions, 0),
            ("logit_tokens", self._logit_tokens(plan), 0),
            ("write_slots", plan.write_slots, -1),
            ("write_tokens", plan.write_tokens, 0),
            ("keys", sampling.keys, 0),
            ("indices", sampling.indices, 0),
            ("temperature", sampling.temperature, 0),
            ("top_k", _NONE if shaping is None else shaping.top_k, 0),
            ("top_p", _NONE if shaping is None else shaping.top_p, 1),
            ("min_p", _NONE if shaping is None else shaping.min_p, 0),
            ("items", work.items, 0),
            ("tokens", work.tokens, 0),
            ("limits", work.limits, 0),
            ("tails", work.tails, 0),
            ("counts", work.counts, 0),
            ("shares", work.shares, 0),
            ("at_end", moves.at_end, 0),
            ("ends", moves.ends, -1),
        )
        if segments is not None:
            self._put(
                ("segment_borders", _filled(segments.borders, len(self.host["segment_borders"])), 0),
                ("segment_begins", segments.begins, 0),
                ("segment_seen", segments.seen, 0),
                ("prompt_slots", segments.slots, 0),
            )
        pages = self.host["pages"]
        pages[: work.pages.size] = work.pages
        self.upload(leave_out=pages.nbytes - work.pages.nbytes)

    def upload(self, leave_out: int = 0) -> None:
        """Copy to the device, but for the last `leave_out` bytes or some less."""
        total = len(self._device)
        end = min(-(-(total - leave_out) // UPLOAD_UNIT) * UPLOAD_UNIT, total)
        slices = self._slices.get(end)
        if slices is None:
            slices = self._slices[end] = [(self._device[:end], host[:end]) for host in self._hosts]
        there, here = slices[self._turn]
        there.copy_(here, non_blocking=True)
        self._turn = 1 - self._turn

    def _logit_tokens(self, plan: StepPlan) -> npt.NDArray[np.generic]:
        """The last tokens of the rows that want one; the same array as long as the plan's are the same."""
        borders, sample, tokens = self._logits
        if borders is not plan.borders or sample is not plan.sample:
            tokens = plan.borders[1:][plan.sample] - 1
            self._logits = plan.borders, plan.sample, tokens
        return tokens

    def _put(self, *fields: tuple[str, npt.NDArray[np.generic], int]) -> None:
        """Write values, and the number beside them wherever others stood behind them, where they do not stand yet."""
        written, host = self._written[self._turn], self.host
        for name, values, rest in fields:
            before = written.get(name)
            if before is values:
                continue
            target, length = host[name], len(values)
            target[:length] = values
            if before is None:
                target[length:] = rest
            elif len(before) > length:
                target[length : len(before)] = rest
            written[name] = values


def _filled(borders: npt.NDArray[np.generic], length: int) -> npt.NDArray[np.generic]:
    """Borders of as many segments as there is room for; the last ones have no tokens."""
    return np.concatenate((borders, np.repeat(borders[-1:], length - len(borders))))
