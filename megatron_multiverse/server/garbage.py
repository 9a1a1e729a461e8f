"""Python's garbage collection in processes that serve."""

from __future__ import annotations

import gc


def freeze_objects() -> None:
    """Free what is garbage, and let later collections look at nothing that is there now: for the 290,000 objects that
    imports and a model leave, each would stop all answers for 0.1 s (benchmarks/results/garbage_cpu.json)."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
