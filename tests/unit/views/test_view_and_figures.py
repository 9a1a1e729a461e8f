"""Views of samples, their timelines, and pictures that can be opened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_multiverse.data.readers import read_rows
from megatron_multiverse.data.sources import open_source
from megatron_multiverse.errors import ConfigError, DataError, StructureError
from megatron_multiverse.evaluation.texts import Texts
from megatron_multiverse.structure import Block, render, visible_matrix
from megatron_multiverse.views.figures import draw_positions, draw_timeline, draw_visibility
from megatron_multiverse.views.sample_file import load_view
from megatron_multiverse.views.sample_view import (
    SampleView,
    ideal_timeline,
    sequential_timeline,
    stretches,
    view_text,
)

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "docs" / "images" / "example.txt"


@pytest.fixture
def view() -> SampleView:
    return load_view(str(EXAMPLE), strict=True)


def test_pieces_are_the_text(view: SampleView) -> None:
    assert "".join(view.pieces) == EXAMPLE.read_text().rstrip("\n")


def test_stretches_cover_the_text_branch_by_branch(view: SampleView) -> None:
    assert [s.branch for s in view.stretches] == ["", "1", "2", "2.1", "2.2", "2", ""]
    ends = [0, *(s.end for s in view.stretches)]
    assert [s.start for s in view.stretches] == ends[:-1] and ends[-1] == len(view.pieces)
    for stretch in view.stretches:
        text = "".join(view.pieces[stretch.start : stretch.end])
        assert text.startswith("\n<Path>\n" + stretch.branch + ":") or stretch.branch in ("", "2")


def test_tokens_of_different_branches_see_each_other_as_the_tree_says(view: SampleView) -> None:
    visible = visible_matrix(view.layout)
    first = {stretch.branch: stretch for stretch in reversed(view.stretches)}
    for looking, looked_at, expected in (("2", "1", False), ("2.2", "2.1", False), ("2.1", "2", True), ("1", "", True)):
        one, other = first[looking], first[looked_at]
        assert visible[one.start : one.end, other.start : other.end].all() == expected
        assert visible[one.start : one.end, other.start : other.end].any() == expected


def test_ideal_timeline_takes_as_many_steps_as_the_longest_chain(view: SampleView) -> None:
    spans, one_by_one = ideal_timeline(view), sequential_timeline(view)
    assert max(span.end for span in spans) == view.layout.position_ids[-1] + 1 < len(view.pieces)
    assert max(span.end for span in one_by_one) == sum(span.tokens for span in spans) == len(view.pieces)
    siblings = [span for span in spans if span.branch in ("2.1", "2.2")]
    assert siblings[0].start == siblings[1].start and siblings[0].block == siblings[1].block != 0


def test_prompt_takes_no_steps_and_its_tags_mean_nothing() -> None:
    view = view_text("fine", prompt="say <Path> twice")
    assert [(s.branch, s.start, s.end) for s in view.stretches] == [("", 0, len(view.pieces))]
    assert [(span.start, span.end) for span in ideal_timeline(view)] == [(0, 1)]


def test_repeated_blocks_have_their_own_numbers() -> None:
    block = Block(("a", "b"), (("x",), ("y y y",)), "z")
    view = view_text(render((block, "then", block)), strict=True)
    assert [s.block for s in stretches(view.document) if s.branch == "1"] == [1, 2]


def test_figures_are_pictures_with_something_on_them(view: SampleView, tmp_path: Path) -> None:
    from matplotlib.image import imread

    draw_visibility(view, tmp_path / "visibility.png")
    draw_positions(view, tmp_path / "positions.png")
    labels = {"2.1": "tens"}
    draw_timeline(ideal_timeline(view), tmp_path / "new" / "t.png", sequential=sequential_timeline(view), labels=labels)
    draw_timeline(ideal_timeline(view), tmp_path / "alone.png")
    for path in (tmp_path / "visibility.png", tmp_path / "positions.png", tmp_path / "new" / "t.png"):
        pixels = imread(path)[..., :3].reshape(-1, 3)
        blue, orange = (
            np.abs(pixels - np.array(color)).max(1) < 0.05 for color in ((0.17, 0.47, 0.82), (0.93, 0.54, 0.16))
        )
        assert blue.sum() > 200 and orange.sum() > 100
        assert path.stat().st_size < 150_000


def test_timeline_refuses_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        draw_timeline([], tmp_path / "x.png")


def test_load_view_reads_rows_and_says_what_is_missing(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    text = EXAMPLE.read_text().rstrip("\n")
    rows.write_text("".join(json.dumps({"prompt": f"p{k}", "response": text}) + "\n" for k in range(2)))
    plain, cut = (
        load_view(str(rows), 2),
        load_view(str(rows), 2, tokenizer_model=str(ROOT / "examples/quickstart/model")),
    )
    assert plain.pieces[0] == "p1" and plain.document.prompt_length == 1
    assert "".join(cut.pieces) == "p1" + text and len(cut.pieces) > len(plain.pieces)
    assert [s.branch for s in cut.stretches] == [s.branch for s in plain.stretches]
    for number in (0, -1, 3):
        with pytest.raises(DataError, match=f"no row {number}: rows count from 1"):
            load_view(str(rows), number)
    with pytest.raises(ConfigError, match="no such file"):
        load_view(str(tmp_path / "none.txt"))
    broken = tmp_path / "broken.txt"
    broken.write_text(text.replace("</Goal>", "", 1))
    with pytest.raises(StructureError, match=r"broken\.txt"):
        load_view(str(broken), strict=True)
    assert load_view(str(broken)).document.malformed


def test_conversations_with_tools_can_be_looked_at(tmp_path: Path) -> None:
    """No prompt is rendered that would have to show them."""
    text = EXAMPLE.read_text().rstrip("\n")
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": text}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]}) + "\n")
    assert "".join(load_view(str(rows)).pieces) == "p" + text
    source = open_source(str(rows))
    question, response, _ = Texts(source, None, None).read(next(read_rows(source.shards[0])))
    assert (question, response) == ("p", text)


ODD_FILES = {
    "null.jsonl": (b'{"prompt": "a", "response": null}\n', "not_text"),
    "cut.jsonl": (b'{"prompt": "a", "resp', "no readable row; the first one is not JSON"),
    "latin.txt": (b"caf\xe9", "encoding: not UTF-8 at byte 3"),
    "empty.jsonl": (b"", "no readable row"),
    "blank.txt": (b"\n", "empty"),
    "array.json": (b"[]", "JSON array"),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_what_preprocessing_refuses_is_refused_here(tmp_path: Path, name: str) -> None:
    content, message = ODD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ConfigError, DataError), match=message):
        load_view(str(tmp_path / name))


def test_files_are_read_as_preprocessing_reads_them(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf<Think>\nx\n</Think>\n")
    assert "".join(load_view(str(tmp_path / "bom.txt"), strict=True).pieces) == "<Think>\nx\n</Think>"
    windows = EXAMPLE.read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "windows.txt").write_bytes(windows)
    with pytest.raises(StructureError, match="carriage return"):
        load_view(str(tmp_path / "windows.txt"), strict=True)
    pq.write_table(pa.table({"q": ["p"], "r": ["plain"]}), tmp_path / "rows.parquet")
    assert "".join(load_view(str(tmp_path / "rows.parquet"), json_keys=["q", "r"]).pieces) == "pplain"
