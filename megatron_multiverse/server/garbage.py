"""Python's garbage collection in processes that serve."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


def freeze_objects() -> None:
    """Free what is garbage, and let later collections look at nothing that is there now: for the 290,000 objects that
    imports and a model leave, each would stop all answers for 0.1 s (benchmarks/results/garbage_cpu.json)."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """No collection while the block makes many objects at once, none of which is garbage: each collection would look
    at all of them again, which holds streams up while a large body is read (benchmarks/server/bodies.py)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
