"""The table of attention backends, and the one place that chooses among them.

A backend has two halves. `prepare` turns the labels of a microbatch into whatever its kernel wants (a mask, tile
lists), once for all layers; `attend` is called by every layer. To add a backend, write its module beside this file and
put it into `BACKENDS` before those that are slower. The choice and its reason are logged once per process.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.errors import ConfigError

from .dense import dense_attention, dense_plan
from .flash4 import flash4_attention, flash4_plan, flash4_problem
from .flex import flex_attention, flex_plan, flex_problem
from .layout import AttentionCase, AttentionLayout

logger = logging.getLogger(__name__)


def _no_problem(case: AttentionCase) -> str | None:
    return None


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention under the visibility rule."""

    prepare: Callable[[AttentionLayout, AttentionCase], Any]
    """(layout, case) -> plan, made once per microbatch."""
    attend: Callable[[Tensor, Tensor, Tensor, Any, float | None], Tensor]
    """(q [b, h, s_q, d], k, v [b, g, s_k, d], plan, softmax_scale) -> [b, h, s_q, d]."""
    problem: Callable[[AttentionCase], str | None] = _no_problem
    """Why this backend cannot run, or None."""


BACKENDS: dict[str, AttentionBackend] = {
    "flash4": AttentionBackend(flash4_plan, flash4_attention, flash4_problem),
    "flex": AttentionBackend(flex_plan, flex_attention, flex_problem),
    "dense": AttentionBackend(dense_plan, dense_attention),
}
"""Fastest first: "auto" takes the first that can run."""


@functools.cache
def choose_backend(name: str, case: AttentionCase) -> str:
    """The backend called `name`, or the name of the best one for this case if it is "auto". Logs the choice.

    Raises:
        ConfigError: see `check_backend`.
    """
    reason = "asked for"
    if name == "auto":
        name, reason = _auto(case)
    check_backend(name, case)
    _log_once(name, reason)
    return name


@functools.cache
def check_backend(name: str, case: AttentionCase) -> None:
    """Raise ConfigError if there is no backend of that name, or it cannot run here; the message says why."""
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention_backend {name!r}, allowed: auto, {', '.join(BACKENDS)}")
    problem = BACKENDS[name].problem(case)
    if problem is not None:
        raise ConfigError(f"attention_backend {name!r} cannot run here: {problem}; or set attention_backend to auto")


def _auto(case: AttentionCase) -> tuple[str, str]:
    """Name of the backend for "auto", and the reason."""
    if case.device_type == "cpu":
        return "dense", "on the CPU"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return "dense", f"{case.dtype} is for exactness, not for speed"
    reasons: list[str] = []
    for name, backend in BACKENDS.items():
        problem = backend.problem(case)
        if problem is None:
            return name, "; ".join(["the fastest that runs here", *reasons])
        reasons.append(f"not {name}: {problem}")
    raise AssertionError("dense runs everywhere")


@functools.cache
def _log_once(name: str, reason: str) -> None:
    logger.info("attention backend: %s (%s)", name, reason)
