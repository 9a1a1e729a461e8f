"""Parallel decoding: a paged cache, a tree of branches over it, and the engine that runs them.

Where to look, in the order of a token's life: `engine.py` (one step), `scheduler.py` (who runs in it),
`preemption.py` (when pages run short or a step fails), `context.py` and `runner.py` (the model call), `sampler.py`,
`commit.py` (what the chosen token does), `budget.py` (where max_tokens is enforced), `fork_join.py` (how a branch
splits and comes together), `tree.py` and `pages.py` (its cache), `prefix.py` (prompts that begin alike).
"""

from megatron_multiverse.inference.detokenize import IncrementalDetokenizer
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.request import Request
from megatron_multiverse.inference.result import BlockResult, BranchResult, Result, TimelineSpan
from megatron_multiverse.inference.sampler import CounterSampler, Sampler

__all__ = [
    "BlockResult",
    "BranchResult",
    "CounterSampler",
    "Engine",
    "IncrementalDetokenizer",
    "Request",
    "Result",
    "Sampler",
    "TimelineSpan",
]
