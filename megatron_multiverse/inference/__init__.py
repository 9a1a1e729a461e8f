"""Parallel decoding: a paged cache, a tree of branches over it, and the engine that runs them.

Three rooms, and the loop that joins them:

- `text/`: what is written. Requests, branches, forks, joins, budgets, answers; no page, no tensor.
- `cache/`: who owns which page. Integers only.
- `step/`: one model call, from the integers of a `StepPlan` to tokens and log-probabilities.
- `engine.py` plans (`scheduler.py`), runs (`step/runner.py`) and commits (`text/commit.py`) a step.
"""

from megatron_multiverse.config.engine import EngineConfig, SamplingParams
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.step.plan import SamplingArrays, StepOutput, StepPlan
from megatron_multiverse.inference.step.sampler import CounterSampler, Sampler
from megatron_multiverse.inference.text.detokenize import IncrementalDetokenizer
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.inference.text.result import BlockResult, BranchResult, Result, TimelineSpan
from megatron_multiverse.inference.text.state import TokenCallback

__all__ = [
    "BlockResult",
    "BranchResult",
    "CounterSampler",
    "Engine",
    "EngineConfig",
    "IncrementalDetokenizer",
    "Request",
    "Result",
    "Sampler",
    "SamplingArrays",
    "SamplingParams",
    "StepOutput",
    "StepPlan",
    "TimelineSpan",
    "TokenCallback",
]
