"""A folder that one process works in at a time, for one run with the same settings whenever it goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.files import try_lock, write_json_atomic

NAMES = RECORD, _LOCK = "run.json", "lock"
_PATIENCE_S = 2.0  # a killed run takes a moment to let go


class LockedFolder:
    """The folder of a run, locked from `__enter__` to `__exit__`; run.json in it holds the settings.

    Args:
        path: made if it is missing.
        settings: what must be the same when the run goes on, as JSON values.
        run: what such a run is called in messages, with its article.
        remarks: what run.json also tells a reader, as JSON values, and may be otherwise when the run goes on.

    Attributes:
        remarks: once entered: those that run.json tells; None for one that it does not, as of an earlier version.

    Raises:
        ConfigError: on entering: the folder holds something else, or a run with other settings.
        DataError: on entering: another process works here.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], run: str, remarks: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self.remarks = dict(remarks or {})
        self._settings = settings
        self._run = run
        self._lock: IO[str] | None = None

    def __enter__(self) -> LockedFolder:
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / _LOCK).is_file():
            raise ConfigError(f"--output {self.path} holds something else than {self._run}: choose a new folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / _LOCK, "a", encoding="utf-8")
        try:
            self._take_lock(self._lock)
            self._check_settings()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def is_unused(self) -> bool:
        """Whether nothing has been made here yet, so that other settings do no harm: an earlier start ended at once, as
        where a key is missing."""
        return all(file.name in NAMES for file in self.path.iterdir())

    def remark(self, **remarks: Any) -> None:
        """Let run.json tell these from now on."""
        self.remarks |= remarks
        write_json_atomic(self.path / RECORD, self._settings | self.remarks)

    def _take_lock(self, lock: IO[str]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not try_lock(lock):
            if time.monotonic() > deadline:
                raise DataError(f"another run works in {self.path}: wait for it, or choose another --output")
            time.sleep(0.05)

    def _check_settings(self) -> None:
        file = self.path / RECORD
        if not file.is_file() or self.is_unused():
            self.remark()
            return
        earlier = json.loads(file.read_text(encoding="utf-8"))
        self.remarks = {name: earlier.pop(name, None) for name in self.remarks}
        now = self._settings
        told = [
            f"{name} was {earlier[name]!r} and is {now[name]!r} now"
            for name in sorted(earlier.keys() & now.keys())
            if earlier[name] != now[name]
        ]
        # As where a server was asked before, and a model in this process is now.
        told += [f"{name} was not recorded" for name in sorted(now.keys() - earlier.keys()) if now[name] is not None]
        told += [
            f"{name} is not known now" for name in sorted(earlier.keys() - now.keys()) if earlier[name] is not None
        ]
        if told:
            lines = ", ".join(told)
            raise ConfigError(f"--output {self.path} holds a run with other settings ({lines}): choose a new folder")
