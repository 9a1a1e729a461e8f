"""What one decode step goes through: which of our files a reader has to open, how many functions, how deep.

    python tools/dev/trace_step.py

answers a problem of the quickstart with its model and traces every step. It prints one of each kind: a step that only
decodes, one that writes a fork or a join, and one that makes it in the cache. Calls into other packages do not count,
nor do comprehensions. What lies below the model's forward pass is counted on its own.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
OWN = tuple(f"{ROOT / name}/" for name in ("megatron_multiverse", "kernels"))
QUICKSTART = ROOT / "examples" / "quickstart"


@dataclass
class Trace:
    """Calls of our own functions while it is set by `sys.setprofile`."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(file, function) -> number of calls."""
    forward: set[str] = field(default_factory=set)
    """Files of the forward pass: the layers' products, attention, and their kernels."""
    deepest: list[str] = field(default_factory=list)
    """Our own frames where they were most, outermost first."""

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """For `sys.setprofile`."""
        name = own_name(frame)
        if event == "call" and name is not None:
            if in_forward(frame):
                self.forward.add(name[0])
                return
            self.calls[name] += 1
            frames = own_frames(frame)
            if len(frames) > len(self.deepest):
                self.deepest = frames

    @property
    def files(self) -> set[str]:
        """Files whose functions were called."""
        return {file for file, _ in self.calls}

    def called(self, file: str, function: str) -> bool:
        """Whether this function of the file was called."""
        return (f"megatron_multiverse/inference/{file}", function) in self.calls

    def lines(self) -> list[str]:
        """What the trace shows, for people."""
        head = f"{len(self.files)} files, {len(self.calls)} functions, {self.calls.total()} calls"
        files = [
            f"  {file}: {', '.join(name for where, name in self.calls if where == file)}" for file in sorted(self.files)
        ]
        below = f"  forward pass, {len(self.forward)} files: {', '.join(sorted(self.forward))}"
        return [head, *files, below, f"  deepest, {len(self.deepest)} frames: {' > '.join(self.deepest)}"]


def own_name(frame: FrameType) -> tuple[str, str] | None:
    """(file, function) of a frame of ours; None for other packages and for comprehensions."""
    path, function = frame.f_code.co_filename, frame.f_code.co_name
    if function.startswith("<") or not path.startswith(OWN):
        return None
    return path[len(str(ROOT)) + 1 :], function


def in_forward(frame: FrameType) -> bool:
    """Whether the model's forward pass called this function."""
    above = frame.f_back
    while above is not None:
        if above.f_code.co_qualname == "PagedForward.__call__":
            return True
        above = above.f_back
    return False


def own_frames(frame: FrameType | None) -> list[str]:
    """Names of our own functions that are running, outermost first."""
    names = []
    while frame is not None:
        if name := own_name(frame):
            names.append(name[1])
        frame = frame.f_back
    return names[::-1]


def trace_steps() -> list[Trace]:
    """A trace of every step that answers one problem with nested blocks."""
    sys.path.insert(0, str(QUICKSTART))
    import torch
    from decode import Decoder
    from measure import fresh_problems

    from megatron_multiverse.config import SamplingParams
    from megatron_multiverse.inference import Request

    torch.set_num_threads(1)
    decoder = Decoder(QUICKSTART / "model", num_pages=1024)
    problem = next(p for p in fresh_problems(50, seed=4) if p.depth == 2 and len(p.expressions) == 2)
    prompt = decoder.prompt_ids(problem, "parallel")
    decoder.engine.add_request(Request(prompt_ids=prompt, sampling=SamplingParams(max_tokens=3000)))
    traces = []
    while decoder.engine.has_work:
        traces.append(Trace())
        sys.setprofile(traces[-1])
        decoder.engine.step()
        sys.setprofile(None)
    return traces


SPECIAL = {
    "writes a fork": ("text/commit.py", "_fork"),
    "forks in the cache": ("cache/tree.py", "fork"),
    "writes a join": ("text/commit.py", "_join"),
    "joins in the cache": ("cache/tree.py", "join"),
}
"""What few steps do, and the function that does it."""


def first_of_each_kind(traces: list[Trace]) -> dict[str, Trace]:
    """The first step that only decodes, after the prompt, and the first one that does what `SPECIAL` names."""
    plain = next(trace for trace in traces[3:] if not any(trace.called(*place) for place in SPECIAL.values()))
    special = {what: next(t for t in traces if t.called(*place)) for what, place in SPECIAL.items()}
    return {"only decodes": plain} | special


def main() -> None:
    traces = trace_steps()
    for what, trace in first_of_each_kind(traces).items():
        print(f"a step that {what}: " + "\n".join(trace.lines()))
    most = max(len(trace.files) for trace in traces)
    print(f"{len(traces)} steps; most files in one: {most}, most frames: {max(len(t.deepest) for t in traces)}")


if __name__ == "__main__":
    main()
