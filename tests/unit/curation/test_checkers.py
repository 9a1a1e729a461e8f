"""Answers checked in processes of their own: the same rows, and errors that reach the run."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.curation import report, run_folder
from megatron_multiverse.curation.desk import Desk
from megatron_multiverse.curation.exchange import Answer
from megatron_multiverse.errors import DataError
from tests.unit.curation.anthropic_server import AnthropicServer
from tests.unit.curation.conftest import Run, random_scripts

SCRIPTS = random_scripts(6)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(report, "draw_report", lambda *_: None)
    return Run(tmp_path, SCRIPTS)


def test_processes_write_the_same_rows(run: Run) -> None:
    rows = []
    for workers in (0, 2):
        run.output = run.folder / str(workers)
        with AnthropicServer(SCRIPTS) as server:
            assert run(server, workers=workers).tally.passed == len(SCRIPTS)
            assert set(server.delivered.values()) == {1}
        rows.append((run.output / "rows.jsonl").read_bytes())
    assert rows[0] == rows[1]


def test_a_full_disk_in_a_process_ends_the_run_and_the_next_start_goes_on(run: Run) -> None:
    real, written = run_folder.write_json_atomic, []

    def write(path: Path, value: Any, **options: Any) -> None:
        written.append(path)  # each process counts its own
        if len(written) == 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, value, **options)

    with AnthropicServer(SCRIPTS) as server:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(run_folder, "write_json_atomic", write)
            run(server, workers=1)
        assert run(server, workers=1).tally.passed == len(SCRIPTS)
        assert sum(count - 1 for count in server.delivered.values()) <= 1


def test_a_killed_process_ends_the_run_and_the_next_start_goes_on(run: Run) -> None:
    def tell(self: Desk, talk: Any, answer: Answer) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with AnthropicServer(SCRIPTS) as server:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match=r"was killed.*run the same command"):
            patch.setattr(Desk, "tell", tell)
            run(server, workers=2)
        assert run(server, workers=2).tally.passed == len(SCRIPTS)


def test_a_fault_in_a_process_is_shown_with_its_place(run: Run) -> None:
    def tell(self: Desk, talk: Any, answer: Answer) -> None:
        raise KeyError("no such thing")

    with (
        AnthropicServer(SCRIPTS) as server,
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(RuntimeError, match=r"(?s)KeyError: 'no such thing'.*test_checkers.py"),
    ):
        patch.setattr(Desk, "tell", tell)
        run(server, workers=1)
