"""Interrupted conversions go on where they stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.checkpoints import convert as driver
from megatron_multiverse.checkpoints.formats.hf import HFSource
from megatron_multiverse.checkpoints.manifest import MANIFEST_FILE, Manifest
from megatron_multiverse.errors import CheckpointError, ConfigError
from tests.unit.checkpoints.test_convert import assert_same, hf_folder, run


class Killed(BaseException):
    pass


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the tensors read; the test may set `limit`, after which reading dies."""
    seen: list[str] = Reads()
    original = HFSource.read

    def read(self: HFSource, entry: Any) -> Any:
        if len(seen) == seen.limit:
            raise Killed
        seen.append(entry.mcore)
        return original(self, entry)

    monkeypatch.setattr(HFSource, "read", read)
    yield seen


class Reads(list):
    limit = -1


def stamps(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*.distcp")}


@pytest.mark.parametrize("limit", [1, 9, 16])
def test_finished_units_are_not_done_again(tmp_path: Path, reads: Reads, limit: int) -> None:
    source, save = hf_folder(tmp_path / "hf"), tmp_path / "out"
    reads.limit = limit
    with pytest.raises(Killed):
        run(source, save, shard_size=20e-6)
    partial = tmp_path / "out.partial"
    assert not save.exists() and partial.is_dir()
    lines = (partial / MANIFEST_FILE).read_text().splitlines()
    done = {k: v for k, v in stamps(partial).items() if any(k.endswith(f"{i}.distcp") for i in range(len(lines) - 1))}
    total, reads.limit = len(reads), -1
    reads.clear()
    result = run(source, save, shard_size=20e-6)
    assert result.resumed_units == len(lines) - 1
    assert len(reads) < 17 or result.resumed_units == 0
    assert len(reads) + total >= 17  # every tensor was read
    assert done.items() <= stamps(save).items()
    assert not partial.exists() and not (save / MANIFEST_FILE).exists()
    run(save, tmp_path / "back", "mcore", "hf")
    assert_same(source, tmp_path / "back")


def test_files_that_do_not_belong_are_written_again(tmp_path: Path, reads: Reads) -> None:
    source, save, partial = hf_folder(tmp_path / "hf"), tmp_path / "out", tmp_path / "out.partial"
    reads.limit = 12
    for damage in ("shorter file", "cut line", "other options", "changed input"):
        shutil.rmtree(partial, ignore_errors=True)
        reads.clear()
        with pytest.raises(Killed):
            run(source, save, shard_size=20e-6)
        units = len((partial / MANIFEST_FILE).read_text().splitlines()) - 1
        assert units > 2
        options: dict[str, Any] = {"shard_size": 20e-6}
        if damage == "shorter file":
            os.truncate(partial / "release/__0_1.distcp", 100)
            left = units - 1
        elif damage == "cut line":
            text = (partial / MANIFEST_FILE).read_text()
            (partial / MANIFEST_FILE).write_text(text[:-20])
            left = units - 1
        elif damage == "other options":
            options, left = {"shard_size": 20e-6, "dtype": "bf16"}, 0
        else:
            os.utime(sorted(source.glob("*.safetensors"))[0], (1, 1))
            left = 0
        reads.limit = -1
        assert run(source, save, **options).resumed_units == left, damage
        run(save, tmp_path / "back", "mcore", "hf")
        if damage != "other options":
            assert_same(source, tmp_path / "back")
        shutil.rmtree(save)
        shutil.rmtree(tmp_path / "back")
        reads.limit = 12


def test_only_one_conversion_writes_a_folder(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "hf")
    with Manifest(tmp_path / "out.partial", {}), pytest.raises(CheckpointError, match="by another conversion"):
        run(source, tmp_path / "out")


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hf_folder(tmp_path / "hf")
    monkeypatch.setattr(driver.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConfigError, match=r"needs 0.0 GB more, the disk has 0.0 GB free"):
        run(source, tmp_path / "out")
    assert not list((tmp_path / "out.partial").rglob("*.distcp"))
