"""Which of our files, functions and call depth one decode step goes through: what a reader has to open.

`python tools/dev/trace_step.py --load examples/quickstart/model` answers a problem of the quickstart and traces single
steps: one that only decodes, and one that joins a block. Files of other packages do not count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
OWN = (str(ROOT / "megatron_multiverse") + "/", str(ROOT / "kernels") + "/")


@dataclass
class Trace:
    """Calls of our own functions during one step."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(file, function) to number of calls."""
    depth: int = 0
    deepest: list[str] = field(default_factory=list)
    """Our own frames at the deepest point, outermost first."""

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """For `sys.setprofile`."""
        if event == "call" and (where := own_name(frame)):
            self.calls[where] += 1
            frames = [name for f in stack(frame) if (name := own_name(f))]
            if len(frames) > len(self.deepest):
                self.deepest = [f"{file}:{function}" for file, function in reversed(frames)]


def own_name(frame: FrameType) -> tuple[str, str] | None:
    """(file, function) of a frame of ours; None for other packages and for comprehensions."""
    path, function = frame.f_code.co_filename, frame.f_code.co_name
    if function.startswith("<"):
        return None
    return next(((path[len(str(ROOT)) + 1 :], function) for own in OWN if path.startswith(own)), None)


def stack(frame: FrameType | None) -> Any:
    """The frame and its callers."""
    while frame is not None:
        yield frame
        frame = frame.f_back
