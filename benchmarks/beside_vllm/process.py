"""Starts the processes that measure, and asks them one at a time."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WorkerProcess:
    """A process that runs `worker.serve`, in a group of its own; what it prints goes to a log.

    Args:
        name: of its log.
        module: what to run.
        setup: its first line.
        environment: what differs from this process's.
        folder: for the log.
    """

    def __init__(
        self, name: str, module: str, setup: Mapping[str, Any], environment: Mapping[str, str], folder: Path
    ) -> None:
        self.name = name
        self.ready: dict[str, Any] | None = None
        self.failed: str | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        with open(folder / f"{name.replace(' ', '_')}.log", "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **environment},
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=self._read, daemon=True).start()
        self._send(setup)

    def wait_until_ready(self, until: float) -> None:
        """Until it has begun, has ended, or `time.monotonic()` reaches `until`, when it is ended."""
        self.ready = self._take(until, "it was not ready in time")

    def measure(self, case: Mapping[str, Any], until: float) -> dict[str, Any] | None:
        """Figures of a case, or None: it failed, or took too long and was ended."""
        if self.failed is not None:
            return None
        self._send(case)
        figures = self._take(until, f"it took too long: {case}")
        if figures is not None and "error" in figures:
            print(f"{self.name}: {figures['error']}", flush=True)
            return None
        return figures

    def end(self) -> None:
        """End it and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self, line: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer will be that it has ended
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _take(self, until: float, late: str) -> dict[str, Any] | None:
        try:
            line = self._answers.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            line, self.failed = None, late
        else:
            self.failed = "it has ended: see its log" if line is None else None
        if line is None:
            print(f"{self.name}: {self.failed}", flush=True)
            self.end()
            return None
        found: dict[str, Any] = json.loads(line)
        return found
