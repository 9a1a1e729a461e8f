"""Where the time of a block's turns goes: the steps that begin its paths, and its conclusion.

Such a step can be planned only once the tokens before it are known, so the GPU waits for the host meanwhile.
`TurnWatch` times what the host does until the step is launched; an engine that nobody watches runs none of this.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_multiverse.inference.draft import Step
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.step.plan import StepOutput, StepPlan
from megatron_multiverse.inference.step.runner import PendingOutput
from megatron_multiverse.inference.step.sampler import Sampler


@dataclass
class Turn:
    """A step that forked or joined a block in the cache. All times are in seconds."""

    kind: str
    """fork or join."""
    commit: float
    """From the arrival of the tokens until planning begins: writing what they mean."""
    plan: float
    """From there until the step is known."""
    copy: float
    """From there until the copies of slots are launched; without graphs this and the next are part of `launch`."""
    prepare: float
    """From there until a graph's input is on its way, list of work included."""
    launch: float
    """From there until everything is launched; without a GPU the step has run by then."""
    events: Sequence[torch.cuda.Event] = ()
    """On a GPU: the end of the step before, the beginning of this one's copies and of its graph, and its end."""

    def figures(self) -> dict[str, float]:
        """Milliseconds of each part. On a GPU, which has to be done with the step, also how long it waited before the
        step, how long its copies took and the wait for the graph after them, and its graph: `gpu_idle_ms`,
        `gpu_copy_ms`, `gpu_run_ms`."""
        found = {f"{part}_ms": 1e3 * getattr(self, part) for part in ("commit", "plan", "copy", "prepare", "launch")}
        pairs = itertools.pairwise(self.events)
        found |= {
            f"gpu_{part}_ms": a.elapsed_time(b) for part, (a, b) in zip(("idle", "copy", "run"), pairs, strict=False)
        }
        return found


@dataclass(eq=False)
class TurnWatch:
    """Times the turns of an engine within a `with` statement, by standing before its methods."""

    engine: Engine
    turns: list[Turn] = field(default_factory=list)
    """Those of all requests, in the order in which they were launched."""
    _arrived: float = 0.0
    _planned: tuple[float, float, str] = (0.0, 0.0, "")  # when planning began and ended, and what it did
    _unread: set[int] = field(default_factory=set)  # outputs whose tokens nobody has waited for
    _last: torch.cuda.Event | None = None
    _prepared: tuple[float, float, torch.cuda.Event | None] = (0.0, 0.0, None)  # when that of a graph began and ended

    def __enter__(self) -> TurnWatch:
        engine: Any = self.engine
        engine.runner.launch, engine.scheduler.plan = self._launch, self._plan
        if engine.runner.graphs is not None:
            engine.runner.graphs.prepare = self._prepare
        for output in engine.runner._outputs:
            output.wait = lambda output=output: self._wait(output)
        return self

    def __exit__(self, *_: object) -> None:
        engine: Any = self.engine
        del engine.runner.launch, engine.scheduler.plan  # the class's own show again
        if engine.runner.graphs is not None:
            del engine.runner.graphs.prepare
        for output in engine.runner._outputs:
            del output.wait
        if self._last is not None:
            self._last.synchronize()

    def _wait(self, output: PendingOutput) -> StepOutput:
        tokens = PendingOutput.wait(output)
        if id(output) in self._unread:
            self._unread.discard(id(output))
            self._arrived = time.perf_counter()
        return tokens

    def _plan(self) -> Step | None:
        scheduler = self.engine.scheduler
        before, start = len(scheduler.places.nodes), time.perf_counter()
        step = type(scheduler).plan(scheduler)
        end, after = time.perf_counter(), len(scheduler.places.nodes)
        self._planned = (start, end, "fork" if after > before > 0 else "join" if after < before else "")
        return step

    def _prepare(self, plan: StepPlan, sampler: Sampler) -> Callable[[], Tensor] | None:
        graphs = self.engine.runner.graphs
        assert graphs is not None
        start = time.perf_counter()
        replay = type(graphs).prepare(graphs, plan, sampler)
        self._prepared = start, time.perf_counter(), self._event()
        return replay

    def _launch(self, plan: StepPlan, replay: Callable[[], Tensor] | None = None) -> PendingOutput:
        runner = self.engine.runner
        begin, now = self._event(), time.perf_counter()
        self._prepared = now, now, None
        output = type(runner).launch(runner, plan, replay)
        end, launched = self._event(), time.perf_counter()
        (started, planned, kind), (copied, prepared, graph) = self._planned, self._prepared
        if kind:
            events = [event for event in (self._last, begin, graph or begin, end) if event is not None]
            marks = (self._arrived, started, planned, copied, prepared, launched)
            commit, plan_s, copy, prepare, launch = np.diff(marks).tolist()
            turn = Turn(kind, commit, plan_s, copy, prepare, launch, events if len(events) == 4 else ())
            self.turns.append(turn)
        self._planned, self._last = (0.0, 0.0, ""), end
        self._unread.add(id(output))
        return output

    def _event(self) -> torch.cuda.Event | None:
        """One that is reached when the GPU is done with all that was launched."""
        keys: Tensor = self.engine.runner.store.keys
        if not keys.is_cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
