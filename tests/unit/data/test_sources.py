"""What `--input` stands for: splits, patterns, compressed files, and what only looks like data."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_multiverse.data import readers
from megatron_multiverse.data.input_files import split_of
from megatron_multiverse.data.preprocess import preprocess_data
from megatron_multiverse.data.readers import read_rows
from megatron_multiverse.data.sources import Source, column_names, open_source
from megatron_multiverse.errors import ConfigError, DataError
from tests.unit.data.test_preprocess import _config, _rows, _write_rows


def rows_of(source: Source) -> list[str]:
    return [row.fields["response"] for shard in source.shards for row in read_rows(shard)]


def write(path: Path, *responses: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": "p", "response": response} for response in responses]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        text = gzip.compress(text[: len(text) // 2]) + gzip.compress(text[len(text) // 2 :])  # members, as pigz makes
    elif path.suffix == ".zst":
        half = len(text) // 2
        text = b"".join(pa.compress(part, "zstd", asbytes=True) for part in (text[:half], text[half:]))
    path.write_bytes(text)
    return path


HUB = ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001", "data/validation-0")
FOLDERS = ("train/0", "train/1", "test/0", "dev/0")
WORDS = ("math_train", "a.Training.b", "math_test", "valid")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("names", [HUB, FOLDERS, WORDS], ids=["hub", "folders", "words"])
@pytest.mark.parametrize(
    ("split", "expected"), [(None, [0, 1]), ("train", [0, 1]), ("test", [2]), ("validation", [3]), ("dev", [3])]
)
def test_only_the_files_of_the_split_are_read(tmp_path, names, suffix, split, expected):
    for number, name in enumerate(names):
        write(tmp_path / f"{name}{suffix}", str(number))
    assert sorted(rows_of(open_source(str(tmp_path), split=split))) == [str(number) for number in expected]
    pattern = open_source(f"{tmp_path}/**/*{suffix}", split=split)
    assert sorted(rows_of(pattern)) == [str(number) for number in expected]


def test_splits_with_names_of_their_own(tmp_path):
    for name in ("train_sft", "test_sft", "train_gen"):
        write(tmp_path / f"{name}-00000-of-00001.parquet", name)
    assert rows_of(open_source(str(tmp_path), split="train_sft")) == ["train_sft"]


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["test-0", "validation-0"], None, "name the splits test, validation only, and train was asked for"),
        (["train-0"], "test", "name the splits train only, and test was asked for"),
        (["a", "b"], "test", "name no split"),
        (["train-0", "test-0", "other"], None, "but .*other.jsonl .* after none"),
        (["train_test"], None, "named after several splits"),
    ],
)
def test_splits_that_cannot_be_told_are_refused(tmp_path, names, split, message):
    for name in names:
        write(tmp_path / f"{name}.jsonl", name)
    with pytest.raises(ConfigError, match=message):
        open_source(str(tmp_path), split=split)


def test_unnamed_files_beside_those_of_the_split_are_read(tmp_path):
    for name in ("train-0", "more"):
        write(tmp_path / f"{name}.jsonl", name)
    assert sorted(rows_of(open_source(str(tmp_path)))) == ["more", "train-0"]


def test_a_file_that_is_named_itself_is_read_whatever_its_name(tmp_path):
    file = write(tmp_path / "test.jsonl", "x")
    assert rows_of(open_source(str(file))) == ["x"]
    with pytest.raises(ConfigError, match="--split test has no effect on the file"):
        open_source(str(file), split="test")


@pytest.mark.parametrize("name", ["latest.jsonl", "attrain.jsonl", "x.jsonl", "validity.jsonl"])
def test_words_inside_of_words_name_no_split(name):
    assert split_of(Path(name), "train") is None


def test_a_data_set_saved_from_one_split_holds_no_other(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"prompt": ["a"], "response": ["b"]})
    table.save_to_disk(str(tmp_path / "plain"))
    datasets.Dataset(table.data, split="test").save_to_disk(str(tmp_path / "test"))
    assert rows_of(open_source(str(tmp_path / "plain"))) == ["b"]
    with pytest.raises(ConfigError, match="--split train has no effect"):
        open_source(str(tmp_path / "plain"), split="train")
    with pytest.raises(ConfigError, match="saved from the split test: say --split test"):
        open_source(str(tmp_path / "test"))
    assert rows_of(open_source(str(tmp_path / "test"), split="test")) == ["b"]


def test_several_inputs_are_read_in_their_order(tmp_path):
    files = [write(tmp_path / name, name) for name in ("b.jsonl", "a.parquet", "c.jsonl.gz", "d.jsonl.zst")]
    source = open_source([str(file) for file in files])
    assert rows_of(source) == ["b.jsonl", "a.parquet", "c.jsonl.gz", "d.jsonl.zst"]
    assert source.files == files
    assert rows_of(open_source(f"{tmp_path}/*.jsonl*")) == ["b.jsonl", "c.jsonl.gz", "d.jsonl.zst"]
    with pytest.raises(ConfigError, match=r"a\.parquet is given twice"):
        open_source([str(files[1]), f"{tmp_path}/*.parquet"])
    with pytest.raises(ConfigError, match="no file matches this pattern"):
        open_source(f"{tmp_path}/*.csv")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_rows_become_the_same_documents(tmp_path, hf_folder, suffix):
    rows = _rows(300)
    plain = _write_rows(tmp_path / "rows.jsonl", rows)
    packed = tmp_path / f"rows.jsonl{suffix}"
    text = plain.read_bytes()
    packed.write_bytes(gzip.compress(text) if suffix == ".gz" else pa.compress(text, "zstd", asbytes=True))
    for source, name in ((plain, "plain"), (packed, "packed")):
        preprocess_data(_config(source, tmp_path / name, hf_folder))
    assert (tmp_path / "plain.bin").read_bytes() == (tmp_path / "packed.bin").read_bytes()
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises((ConfigError, DataError), match=rf"rows\.jsonl{suffix} is damaged or cut off"):
        preprocess_data(_config(packed, tmp_path / "cut", hf_folder))


def test_only_looks_like_data(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    cases = {
        "array.json": (b'[\n{"prompt": "a"}]', "JSON array; write one object per line"),
        "pointer.jsonl": (pointer, "git-lfs pointer"),
        "pointer.parquet": (pointer, "git-lfs pointer"),
        "broken.parquet": (b"PAR1xxxxPAR1", "damaged or no Parquet file"),
        "pointer.xml": (pointer, "git-lfs pointer"),
        "broken.jsonl.gz": (b"\x1f\x8bxxxx", "damaged or cut off"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{name}.*{message}"):
            open_source(str(tmp_path / name))


def test_metadata_of_the_hub_is_no_data(tmp_path, caplog):
    write(tmp_path / "data" / "train.jsonl", "x")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.parquet").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert rows_of(open_source(str(tmp_path))) == ["x"]
    assert "2 files are no input of this kind: README.md, dataset_infos.json" in caplog.text


def test_columns_are_those_of_many_rows(tmp_path):
    lines = ["oops", json.dumps({"response": "r"}), json.dumps({"prompt": "p", "response": "r"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    write(tmp_path / "other.parquet", "x")
    source = open_source([str(tmp_path / "rows.jsonl"), str(tmp_path / "other.parquet")])
    assert set(column_names(source)) == {"prompt", "response"}


def test_a_folder_of_trajectories_is_listed_once(tmp_path, monkeypatch):
    for number in range(300):
        (tmp_path / f"{number}.xml").write_text("x" * 100)
    monkeypatch.setattr("megatron_multiverse.data.sources._shard_bytes", lambda total: 800)
    source = open_source(str(tmp_path))
    assert len(source.shards) == 300

    def refuse(*_):
        raise AssertionError("listed again")

    monkeypatch.setattr("os.scandir", refuse)
    monkeypatch.setattr("os.listdir", refuse)
    names = [row.name for shard in source.shards for row in readers.read_rows(shard)]
    assert names == [f"{number}.xml" for number in range(300)]


def test_trajectory_files_as_editors_leave_them(tmp_path, caplog):
    (tmp_path / "1.xml").write_bytes(b"\xef\xbb\xbf<Think>\nx\n</Think>\n")
    (tmp_path / "1.prompt.txt").write_bytes(b"\xef\xbb\xbfWhat?\r\n")
    (tmp_path / "2.XML").write_text("<Think>\ny\n</Think>")
    (tmp_path / "3.prompt.txt").write_text("orphan")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "4.xml").write_text("x")
    with caplog.at_level(logging.WARNING):
        source = open_source(str(tmp_path))
    assert "3 files are no input of this kind" in caplog.text
    assert all(name in caplog.text for name in ("3.prompt.txt", "notes.md", "old/4.xml"))
    found = [row for shard in source.shards for row in read_rows(shard)]
    assert [row.name for row in found] == ["1.xml", "2.XML"]
    assert found[0].fields == {"prompt": "What?", "response": "<Think>\nx\n</Think>"}


def test_blank_files_are_rejected_and_files_without_tags_named(tmp_path, hf_folder, caplog):
    (tmp_path / "in").mkdir()
    for name, text in {
        "1.xml": "<Think>\nx\n</Think>",
        "2.xml": " \n\ufeff",
        "3.xml": "\n",
        "LICENSE.txt": "free",
    }.items():
        (tmp_path / "in" / name).write_text(text)
    with caplog.at_level(logging.WARNING):
        result = preprocess_data(_config(tmp_path / "in", tmp_path / "out", hf_folder, max_rejected=1))
    assert result.totals.rejected == {"empty": 1}
    assert "2 of the 3 files that passed hold no tag: 2.xml, LICENSE.txt" in caplog.text


def test_options_without_effect_are_refused(tmp_path, hf_folder):
    rows = write(tmp_path / "rows.jsonl", "x")
    (tmp_path / "1.xml").write_text("x")
    with pytest.raises(ConfigError, match="--prompt has no effect"):
        preprocess_data(_config(rows, tmp_path / "out", hf_folder, prompt="p"))
    with pytest.raises(ConfigError, match="--json-keys has no effect"):
        preprocess_data(_config(tmp_path / "1.xml", tmp_path / "out", hf_folder, json_keys=["response"]))
    with pytest.raises(ConfigError, match="cannot be mixed in one run: give each kind a run of its own"):
        open_source([str(rows), str(tmp_path / "1.xml")])


def test_the_files_that_are_read_are_named(tmp_path, hf_folder, caplog):
    for name in ("train-0", "train-1", "test-0"):
        write(tmp_path / "in" / f"{name}.jsonl", "x")
    with caplog.at_level(logging.INFO):
        preprocess_data(_config(tmp_path / "in", tmp_path / "out", hf_folder))
    assert [line.rsplit("/", 1)[1] for line in caplog.messages if line.startswith("reading")] == [
        "train-0.jsonl",
        "train-1.jsonl",
    ]
