"""Parallel decoding: a paged cache, a tree of branches over it, and the engine that runs them.

Three rooms, and the loop that joins them:

- `text/`: what is written. Requests, branches, forks, joins, budgets, answers; no page, no tensor.
- `cache/`: who owns which page. Integers only.
- `step/`: one model call, from the integers of a `StepPlan` to tokens and log-probabilities.
- `engine.py` plans (`scheduler.py`), runs (`step/runner.py`) and commits (`text/commit.py`) a step.

Names are imported when they are first used, so that who wants the types of results alone does not load a model's
libraries.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_multiverse.config.engine import EngineConfig
    from megatron_multiverse.config.sampling import SamplingParams
    from megatron_multiverse.inference.build import build_engine
    from megatron_multiverse.inference.engine import Engine
    from megatron_multiverse.inference.record import TrainingRow, from_record, to_record, training_row
    from megatron_multiverse.inference.step.plan import SamplingArrays, Shaping, StepOutput, StepPlan
    from megatron_multiverse.inference.step.sampler import CounterSampler, Sampler
    from megatron_multiverse.inference.text.answer import answer_text, drawn_from
    from megatron_multiverse.inference.text.detokenize import IncrementalDetokenizer
    from megatron_multiverse.inference.text.request import Request, Try
    from megatron_multiverse.inference.text.result import (
        BY_ENGINE,
        BlockResult,
        BranchResult,
        DroppedText,
        Result,
        StopMatch,
        TimelineSpan,
    )
    from megatron_multiverse.inference.text.state import TokenCallback

_HOMES = {
    "config.engine": ("EngineConfig",),
    "config.sampling": ("SamplingParams",),
    "inference.build": ("build_engine",),
    "inference.engine": ("Engine",),
    "inference.record": ("TrainingRow", "from_record", "to_record", "training_row"),
    "inference.step.plan": ("SamplingArrays", "Shaping", "StepOutput", "StepPlan"),
    "inference.step.sampler": ("CounterSampler", "Sampler"),
    "inference.text.answer": ("answer_text", "drawn_from"),
    "inference.text.detokenize": ("IncrementalDetokenizer",),
    "inference.text.request": ("Request", "Try"),
    "inference.text.result": (
        "BY_ENGINE",
        "BlockResult",
        "BranchResult",
        "DroppedText",
        "Result",
        "StopMatch",
        "TimelineSpan",
    ),
    "inference.text.state": ("TokenCallback",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BY_ENGINE",
    "BlockResult",
    "BranchResult",
    "CounterSampler",
    "DroppedText",
    "Engine",
    "EngineConfig",
    "IncrementalDetokenizer",
    "Request",
    "Result",
    "Sampler",
    "SamplingArrays",
    "SamplingParams",
    "Shaping",
    "StepOutput",
    "StepPlan",
    "StopMatch",
    "TimelineSpan",
    "TokenCallback",
    "TrainingRow",
    "Try",
    "answer_text",
    "build_engine",
    "drawn_from",
    "from_record",
    "to_record",
    "training_row",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"megatron_multiverse.{_HOME_OF[name]}"), name)
