"""Runs that are cut off: what is finished is kept, nothing half done passes for whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from megatron_multiverse.data import preprocess as module
from megatron_multiverse.data import worker_pool
from megatron_multiverse.data.preprocess import preprocess_data
from megatron_multiverse.errors import DataError
from tests.unit.data.test_preprocess import ROOT, TOOL, _bytes, _config, _rows, _write_rows
from tests.waiting import PATIENCE_S, wait_until


@pytest.mark.parametrize("damage", ["", '{"key": "ab', "[]", "{}"])
def test_a_damaged_manifest_vouches_for_nothing(tmp_path, hf_folder, damage):
    source = _write_rows(tmp_path / "rows.jsonl", _rows(5))
    preprocess_data(_config(source, tmp_path / "out", hf_folder))
    whole = _bytes(tmp_path / "out")
    (tmp_path / "out_manifest.json").write_text(damage)
    with pytest.raises(DataError, match=r"out\.bin.* exist, and .*out_manifest\.json.* is missing or damaged"):
        preprocess_data(_config(source, tmp_path / "out", hf_folder))
    assert _bytes(tmp_path / "out") == whole
    for file in tmp_path.glob("out*"):
        file.unlink()
    preprocess_data(_config(source, tmp_path / "out", hf_folder))
    assert _bytes(tmp_path / "out") == whole


@pytest.mark.parametrize("crash_in", ["join_shards", "write_json_atomic"])
def test_no_manifest_vouches_for_files_of_a_run_that_was_cut_off(tmp_path, hf_folder, monkeypatch, crash_in):
    """The files of an older run are half replaced: the next run must not find them finished."""
    source = _write_rows(tmp_path / "rows.jsonl", _rows(5))
    preprocess_data(_config(source, tmp_path / "out", hf_folder))
    old = _bytes(tmp_path / "out")
    original = getattr(module, crash_in)

    def dies(target, *args, **kwargs):
        if crash_in == "write_json_atomic" and target.name == "plan.json":
            return original(target, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, crash_in, dies)
    with pytest.raises(KeyboardInterrupt):
        preprocess_data(_config(source, tmp_path / "out", hf_folder, append_eod=True))
    assert not (tmp_path / "out_manifest.json").exists()
    monkeypatch.undo()
    preprocess_data(_config(source, tmp_path / "out", hf_folder))  # what the old manifest promised
    assert _bytes(tmp_path / "out") == old


def test_failed_shard_is_named_and_only_unfinished_shards_are_redone(tmp_path, hf_folder, monkeypatch):
    monkeypatch.setattr("megatron_multiverse.data.sources._shard_bytes", lambda total: total // 6)
    source = _write_rows(tmp_path / "rows.jsonl", _rows(40))
    original = worker_pool.process_shard

    def fails_late(shard, *args, **kwargs):
        if shard.start > source.stat().st_size // 2:
            raise DataError("disk full")
        original(shard, *args, **kwargs)

    monkeypatch.setattr(worker_pool, "process_shard", fails_late)
    with pytest.raises(DataError, match=r"rows\.jsonl \[\d+, \d+\): disk full"):
        preprocess_data(_config(source, tmp_path / "out", hf_folder))
    finished = sorted((tmp_path / "out.shards").glob("*[0-9].json"))
    assert finished and not (tmp_path / "out.bin").exists()
    times = [file.stat().st_mtime_ns for file in finished]
    redone = []

    def counts(shard, path, *args, **kwargs):
        (tmp_path / f"redone-{path.name}").touch()
        original(shard, path, *args, **kwargs)

    monkeypatch.setattr(worker_pool, "process_shard", counts)
    result = preprocess_data(_config(source, tmp_path / "out", hf_folder, workers=2))
    redone = sorted(tmp_path.glob("redone-*"))
    assert result.reused_shards == len(times)
    assert {f.name.removeprefix("redone-") for f in redone}.isdisjoint({f.stem for f in finished})
    preprocess_data(_config(source, tmp_path / "whole", hf_folder))
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_killed_worker_is_a_clear_error(tmp_path, hf_folder, monkeypatch):
    monkeypatch.setattr(worker_pool, "process_shard", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    source = _write_rows(tmp_path / "rows.jsonl", _rows(2))
    with pytest.raises(DataError, match=r"worker process was killed .* run the same command again"):
        preprocess_data(_config(source, tmp_path / "out", hf_folder))


@pytest.mark.parametrize("change", ["input", "settings"])
def test_changed_run_begins_anew(tmp_path, hf_folder, monkeypatch, change):
    source = _write_rows(tmp_path / "rows.jsonl", _rows(4))
    monkeypatch.setattr(module, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        preprocess_data(_config(source, tmp_path / "out", hf_folder))
    monkeypatch.undo()
    if change == "input":
        _write_rows(source, _rows(5))
    result = preprocess_data(_config(source, tmp_path / "out", hf_folder, append_eod=change == "settings"))
    assert result.reused_shards == 0


STANDS_STILL = """
import runpy, sys, time
from megatron_multiverse.data import worker_pool
process_shard = worker_pool.process_shard

def first_alone(shard, *args, **kwargs):
    if shard.start > 0:
        time.sleep(3600)
    process_shard(shard, *args, **kwargs)

worker_pool.process_shard = first_alone
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The tool named by the first argument, which never gets beyond the first shard."""


def test_killed_run_resumes_to_the_same_bytes(tmp_path, hf_folder):
    source = _write_rows(tmp_path / "rows.jsonl", _rows(9000))  # several shards of 1 MiB
    command = [
        str(TOOL), "--input", str(source), "--output-prefix", str(tmp_path / "out"),
        "--tokenizer-model", str(hf_folder), "--workers", "1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", STANDS_STILL, *command], env=environment)
    first = tmp_path / "out.shards" / "00000.json"
    wait_until(lambda: first.exists() or process.poll() is not None, "the first shard is finished")
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers and not psutil.wait_procs(workers, timeout=PATIENCE_S)[1]
    assert not (tmp_path / "out.bin").exists()
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    assert "going on: " in done.stderr
    preprocess_data(_config(source, tmp_path / "whole", hf_folder, workers=2))
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")
