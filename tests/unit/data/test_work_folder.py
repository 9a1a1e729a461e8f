"""Nothing is deleted or replaced that no run of ours has written, and one run at a time writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from megatron_multiverse.data import preprocess as module
from megatron_multiverse.data import work_folder
from megatron_multiverse.data.preprocess import preprocess_data
from megatron_multiverse.data.work_folder import WorkFolder
from megatron_multiverse.errors import ConfigError, DataError
from tests.unit.data.test_preprocess import _bytes, _config, _rows, _write_rows

KEY, OTHER_KEY = "a" * 64, "b" * 64


def _files(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


FOREIGN = {
    "rows": {"0.jsonl": "{}"},
    "rows beside a plan": {"plan.json": json.dumps({"key": KEY}), "rows.jsonl": "{}"},
    "shards without a plan": {"00000.bin": "x", "00000.npy": "x", "00000.json": "{}"},
    "a damaged plan": {"plan.json": '{"key": "ab', "00000.json": "{}"},
    "a plan of something else": {"plan.json": '{"key": "mine"}'},
    "a folder called like a shard": {"plan.json": json.dumps({"key": KEY}), "00000.bin/notes.txt": "x"},
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_that_is_not_ours_is_refused_and_stays(tmp_path, hf_folder, content):
    for name, text in content.items():
        file = tmp_path / "out.shards" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    source = _write_rows(tmp_path / "rows.jsonl", _rows(2))
    before = _files(tmp_path)
    with pytest.raises(DataError, match=r"out\.shards .*choose another --output-prefix"):
        preprocess_data(_config(source, tmp_path / "out", hf_folder))
    assert _files(tmp_path) == before


def test_input_inside_the_work_folder_is_refused_and_stays(tmp_path, hf_folder):
    (tmp_path / "train.shards").mkdir()
    source = _write_rows(tmp_path / "train.shards" / "0.jsonl", _rows(2))
    before = _files(tmp_path)
    for given in (source, source.parent):
        with pytest.raises(ConfigError, match="choose another"):
            preprocess_data(_config(given, tmp_path / "train", hf_folder))
    assert _files(tmp_path) == before


@pytest.mark.parametrize("suffix", ["_rejected.jsonl", "_manifest.json"])
def test_an_input_that_is_an_output_too_is_refused(tmp_path, hf_folder, suffix):
    source = _write_rows(tmp_path / f"out{suffix}", _rows(2))
    text = source.read_text()
    with pytest.raises(ConfigError, match="choose another"):
        preprocess_data(_config(source, tmp_path / "out", hf_folder))
    assert source.read_text() == text


def test_outputs_inside_of_the_input_folder_are_refused(tmp_path, hf_folder):
    """They would be read as rows by the next run."""
    _write_rows(tmp_path / "rows.jsonl", _rows(2))
    with pytest.raises(ConfigError, match="lies inside of --input"):
        preprocess_data(_config(tmp_path, tmp_path / "out", hf_folder))


@pytest.mark.parametrize("suffix", [".bin", ".idx", "_rejected.jsonl"])
def test_files_of_others_are_not_replaced(tmp_path, hf_folder, suffix):
    source = _write_rows(tmp_path / "rows.jsonl", _rows(2))
    (tmp_path / f"out{suffix}").write_text("precious")
    with pytest.raises(DataError, match=r"exist, and .*_manifest\.json"):
        preprocess_data(_config(source, tmp_path / "out", hf_folder))
    assert (tmp_path / f"out{suffix}").read_text() == "precious"
    assert not (tmp_path / "out.shards").exists()


def test_files_of_others_beside_the_outputs_stay(tmp_path, hf_folder):
    source = _write_rows(tmp_path / "rows.jsonl", _rows(2))
    names = ["out.bin.part", "out.idx.part", "out.json", "outer.bin"]
    for name in names:
        (tmp_path / name).write_text("precious")
    preprocess_data(_config(source, tmp_path / "out", hf_folder))
    assert [(tmp_path / name).read_text() for name in names] == ["precious"] * 4
    assert not (tmp_path / "out.shards").exists()


def test_what_is_put_into_the_folder_meanwhile_stays(tmp_path, hf_folder, monkeypatch):
    source = _write_rows(tmp_path / "rows.jsonl", _rows(2))
    original = module.join_shards

    def with_guest(*args, **kwargs):
        (tmp_path / "out.shards" / "notes.txt").write_text("precious")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "join_shards", with_guest)
    preprocess_data(_config(source, tmp_path / "out", hf_folder))
    assert _files(tmp_path / "out.shards") == {"notes.txt": "precious"}


def test_replacing_a_finished_output_of_other_input_is_said(tmp_path, hf_folder, caplog):
    first = _write_rows(tmp_path / "first.jsonl", _rows(2))
    second = _write_rows(tmp_path / "second.jsonl", _rows(5))
    preprocess_data(_config(first, tmp_path / "out", hf_folder))
    old = _bytes(tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        preprocess_data(_config(second, tmp_path / "out", hf_folder))
    assert "replacing" in caplog.text and "first.jsonl" in caplog.text
    assert _bytes(tmp_path / "out") != old


def test_one_run_at_a_time_holds_a_prefix(tmp_path, hf_folder, monkeypatch):
    monkeypatch.setattr(work_folder, "_PATIENCE_S", 0.1)
    source = _write_rows(tmp_path / "rows.jsonl", _rows(2))
    with WorkFolder(str(tmp_path / "out"), KEY), pytest.raises(DataError, match="another run is writing"):
        preprocess_data(_config(source, tmp_path / "out", hf_folder))
    preprocess_data(_config(source, tmp_path / "out", hf_folder))


def test_shards_of_the_same_run_are_kept_and_those_of_another_deleted(tmp_path):
    prefix = str(tmp_path / "out")
    with WorkFolder(prefix, KEY) as folder:
        for suffix in (".bin", ".npy", ".json"):
            folder.part(0).with_suffix(suffix).write_text("x")
        folder.part(1).with_suffix(".json").write_text("x")  # its .bin is lost
    with WorkFolder(prefix, KEY) as folder:
        assert [folder.is_finished(k) for k in range(3)] == [True, False, False]
    with WorkFolder(prefix, OTHER_KEY) as folder:
        assert not folder.is_finished(0)
        folder.delete()
    assert not folder.path.exists()


@pytest.mark.parametrize("prefix", ["out/", "", "out/.", "..", "."])
def test_a_prefix_must_name_the_files(tmp_path, hf_folder, prefix):
    with pytest.raises(ConfigError, match="must end in a name"):
        _config(tmp_path, prefix, hf_folder)


@pytest.mark.parametrize("option", ["workers", "max_rejected"])
def test_negative_numbers_are_refused(tmp_path, hf_folder, option):
    with pytest.raises(ConfigError, match=rf"{option} \(-1\) must be 0 or more"):
        _config(tmp_path, tmp_path / "out", hf_folder, **{option: -1})
