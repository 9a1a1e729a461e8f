"""Files are locked, and the folder of a run takes other settings until something has been made in it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from megatron_multiverse.checkpoints.manifest import Manifest
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.files import try_lock
from megatron_multiverse.locked_folder import LockedFolder


def test_a_lock_is_held_until_the_file_is_closed(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "a") as other:
        with open(tmp_path / "lock", "a") as first:
            assert try_lock(first) and not try_lock(other)
        assert try_lock(other)


def test_where_the_file_system_has_no_locks_work_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with LockedFolder(tmp_path / "run", {}, "an evaluation"), Manifest(tmp_path / "converted", {}):
        warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2 and all("cannot be locked (No locks available)" in line for line in warned)


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with open(tmp_path / "lock", "a") as file, pytest.raises(OSError, match="Input/output error"):
        try_lock(file)


def test_other_settings_are_refused_once_something_has_been_made(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for model in ("a", "b"):
        with LockedFolder(folder, {"model": model}, "an evaluation"):
            pass
    (folder / "samples.jsonl").write_text("")
    with LockedFolder(folder, {"model": "b"}, "an evaluation"):
        pass
    with (
        pytest.raises(ConfigError, match=r"other settings \(model was 'b' and is 'c' now\)"),
        LockedFolder(folder, {"model": "c"}, "an evaluation"),
    ):
        pass
    with (  # as where a server was asked before, which does not say its dtype
        pytest.raises(ConfigError, match=r"other settings \(dtype was not recorded, model is not known now\)"),
        LockedFolder(folder, {"dtype": "bf16"}, "an evaluation"),
    ):
        pass
