"""A file that is not what was written is named, whatever happened to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_multiverse import checksums
from megatron_multiverse.checksums import (
    CHECKSUMS_FILE,
    check_files,
    checksum,
    folder_checksums,
    quick_checksum,
    sampled_pieces,
    write_checksums,
)
from megatron_multiverse.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "inner" / "b.bin").write_bytes(b"b" * 1000)
    (tmp_path / "empty").touch()
    (tmp_path / "config.json").write_text("{}")
    known = {"empty": checksum(tmp_path / "empty")}
    unknown = folder_checksums(tmp_path, without=known)
    assert "empty" not in unknown
    write_checksums(tmp_path, known | unknown)
    return tmp_path


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("name", "byte"), [("a.bin", 0), ("a.bin", 25_599), ("inner/b.bin", 500)])
def test_a_flipped_bit_is_found_by_one_of_those_that_share_the_work(folder: Path, name: str, byte: int) -> None:
    check_files(folder)
    flip(folder / name, byte)
    found = []
    for part in range(2):
        try:
            check_files(folder, part=part, parts=2)
        except CheckpointError as error:
            found.append(str(error))
    assert len(found) == 1 and str(folder / name) in found[0] and "damaged" in found[0]


def test_text_may_be_edited_and_files_may_be_added(folder: Path) -> None:
    (folder / "config.json").write_text('{"edited": true}')
    (folder / "more.bin").write_bytes(b"m")
    check_files(folder)


def test_missing_and_cut_off_files_are_named(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"a\.bin has 5 bytes, it was written with 25600"):
        check_files(folder)
    (folder / "a.bin").unlink()
    with pytest.raises(CheckpointError, match=r"a\.bin is missing"):
        check_files(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"a.bin": {"size": 3}}', '{"a.bin": 7}'])
def test_damaged_checksums_are_one_error(folder: Path, text: str) -> None:
    (folder / CHECKSUMS_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=f"{CHECKSUMS_FILE} is damaged"):
        check_files(folder)


def test_folders_of_others_are_not_checked(folder: Path) -> None:
    assert json.loads((folder / CHECKSUMS_FILE).read_text()).keys() == {"a.bin", "empty", "inner/b.bin"}
    (folder / CHECKSUMS_FILE).unlink()
    flip(folder / "a.bin", 3)
    check_files(folder)


def test_a_quick_checksum_looks_at_places_from_the_first_to_the_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_PLACE_SIZE", 10)
    monkeypatch.setattr(checksums, "_PLACES", 4)
    file, content = tmp_path / "x", bytes(range(250)) * 4
    file.write_bytes(content)
    assert b"".join(sampled_pieces(file)) == b"".join(content[k : k + 10] for k in (0, 330, 660, 990))
    plain = quick_checksum(file)
    for place, seen in ((0, True), (999, True), (335, True), (300, False)):
        flip(file, place)
        assert (quick_checksum(file) != plain) == seen
        flip(file, place)
    file.write_bytes(content[:-10] + b"x" * 10 + content[-10:])  # the same at all places, but of another size
    assert quick_checksum(file) != plain
    monkeypatch.setattr(checksums, "_PLACES", 1000)
    assert b"".join(sampled_pieces(file)) == file.read_bytes()
