"""Parallel decoding: a paged cache, a tree of branches over it, and the engine that runs them.

Where to look: `engine.py` (what a token does: fork, path end, finish), `scheduler.py` (who runs next), `branch.py`
(text and budget of a branch), `tree.py` and `pages.py` (the cache), `prefix.py` (prompts that begin alike),
`context.py` and `runner.py` (the model call).
"""

from megatron_multiverse.inference.detokenize import IncrementalDetokenizer
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.result import BlockResult, BranchResult, Request, Result, TimelineSpan
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
