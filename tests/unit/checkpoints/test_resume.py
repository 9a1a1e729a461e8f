"""Interrupted conversions go on where they stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.checkpoints import convert as driver
from megatron_multiverse.checkpoints.formats.hf import HFSource, HFTarget
from megatron_multiverse.checkpoints.manifest import MANIFEST_FILE, Manifest
from megatron_multiverse.errors import CheckpointError, ConfigError
from tests.unit.checkpoints.hf_folders import save_tokenizer
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


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors.index.json",
             "generation_config.json"]
)  # fmt: skip
def test_a_small_file_that_changed_begins_anew(tmp_path: Path, reads: Reads, name: str) -> None:
    source, save = hf_folder(tmp_path / "hf", vocab_size=320), tmp_path / "out"
    save_tokenizer(source)
    (source / "generation_config.json").write_text("{}")
    reads.limit = 12
    with pytest.raises(Killed):
        run(source, save, to="hf", shard_size=20e-6, add_control_tokens=True)
    reads.limit = -1
    stamp = (source / name).stat()
    (source / name).write_text((source / name).read_text() + " ")
    os.utime(source / name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # the content decides, not the time
    assert run(source, save, to="hf", shard_size=20e-6, add_control_tokens=True).resumed_units == 0


def test_an_exchanged_tokenizer_gives_the_same_as_a_fresh_conversion(tmp_path: Path, reads: Reads) -> None:
    source = hf_folder(tmp_path / "hf", vocab_size=320)
    options: dict[str, Any] = {"to": "hf", "shard_size": 20e-6, "add_control_tokens": True}
    save_tokenizer(source)
    reads.limit = 12
    with pytest.raises(Killed):
        run(source, tmp_path / "out", **options)
    reads.limit = -1
    save_tokenizer(source, extra=3)
    run(source, tmp_path / "out", **options)
    run(source, tmp_path / "fresh", **options)
    assert_same(tmp_path / "out", tmp_path / "fresh")


def test_a_given_model_config_that_changed_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(hf_folder(tmp_path / "hf"), tmp_path / "mcore")
    for name in ("conversion.json", "model_config.json"):
        (tmp_path / "mcore" / name).rename(tmp_path / name)
    original = HFTarget.write

    def write(self: HFTarget, unit: Any, *rest: Any) -> Any:
        if unit is self.units[3]:
            raise Killed
        return original(self, unit, *rest)

    options = {"from_": "mcore", "to": "hf", "shard_size": 20e-6, "model_config": str(tmp_path / "model_config.json")}
    with monkeypatch.context() as patch:
        patch.setattr(HFTarget, "write", write)
        with pytest.raises(Killed):
            run(tmp_path / "mcore", tmp_path / "out", **options)
    shape = json.loads((tmp_path / "model_config.json").read_text())
    (tmp_path / "model_config.json").write_text(json.dumps(shape | {"rotary_base": 5e5}))
    assert run(tmp_path / "mcore", tmp_path / "out", **options).resumed_units == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_theta"] == 5e5


@pytest.mark.parametrize("place", ["notes.txt", "release/notes.txt", "data/rows.jsonl"])
def test_nothing_that_is_not_a_conversions_is_deleted(tmp_path: Path, reads: Reads, place: str) -> None:
    source, save, partial = hf_folder(tmp_path / "hf"), tmp_path / "out", tmp_path / "out.partial"
    reads.limit = 12
    with pytest.raises(Killed):
        run(source, save, shard_size=20e-6)
    reads.limit = -1
    mine = partial / place
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(CheckpointError, match=rf"{mine} is no file that conversions write"):
        run(source, save, shard_size=20e-6, dtype="bf16")
    assert mine.read_text() == "mine" and list(partial.rglob("*.distcp"))


def test_a_folder_that_is_no_unfinished_conversion_is_left_alone(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors and no conversion_progress\.jsonl"):
        run(hf_folder(tmp_path / "hf"), tmp_path / "out")
    assert [path.name for path in partial.iterdir()] == ["model.safetensors"]


def test_only_one_conversion_writes_a_folder(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "hf")
    with Manifest(tmp_path / "out.partial", {}), pytest.raises(CheckpointError, match="by another conversion"):
        run(source, tmp_path / "out")


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hf_folder(tmp_path / "hf")
    monkeypatch.setattr(driver.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConfigError, match=r"needs 0\.000\d+ GB more, the disk has 1e-09 GB free"):
        run(source, tmp_path / "out")
    assert not list((tmp_path / "out.partial").rglob("*.distcp"))
