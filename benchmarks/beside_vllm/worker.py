"""A process that measures one case at a time, as it is told: lines of JSON come in, lines of JSON go out.

What begins a measurement (imports, weights, compiling, CUDA graphs) takes a minute and more, the measurement seconds.
So all processes begin at the same time, and then each measures while the others wait. Imports nothing of this project:
vLLM's side runs with vLLM's packages alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

Measure = Callable[[dict[str, Any]], dict[str, Any]]
"""Case -> its figures."""


def serve(begin: Callable[[dict[str, Any]], tuple[Measure, dict[str, Any]]]) -> None:
    """Begin as the first line says, run each of its cases once for what is compiled, then measure what comes.

    Args:
        begin: what the first line holds -> what measures a case, and what to say of it.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever else is printed goes to the log
    start = time.perf_counter()
    setup = json.loads(sys.stdin.readline())
    measure, said = begin(setup)
    began = time.perf_counter() - start
    for case in setup["cases"]:
        print(f"first run of {case}", file=sys.stderr, flush=True)
        measure(case)
    ready = {**said, "seconds_to_begin": round(began, 1), "seconds_until_ready": round(time.perf_counter() - start, 1)}
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        try:
            figures = measure(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            figures = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(figures), file=answers)


def step_figures(seconds: Sequence[float]) -> dict[str, Any]:
    """Of the intervals between answers in which every sequence got a token: the first ones, which settle, left out."""
    steps = sorted(1e3 * s for s in seconds[8:])
    if not steps:
        raise ValueError(f"{len(seconds)} steps are too few: more than 8 are needed, so ask for more tokens")
    return {"ms_per_step": round(steps[len(steps) // 2], 4), "steps": len(steps)}
