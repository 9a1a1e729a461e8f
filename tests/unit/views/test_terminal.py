"""Branches on the terminal: columns that nest, and plain lines where there is no terminal."""

from __future__ import annotations

import io

from megatron_multiverse.structure import Block, render
from megatron_multiverse.views.terminal import LiveBranches
from megatron_multiverse.views.view import view_text

INNER = Block(("tens", "ones"), (("thirty",), ("nine",)), "both")
TEXT = render(("start", Block(("left", "right"), (("forty-two",), ("split", INNER, "together")), "done"), "end"))


def grow(live: LiveBranches, ids: dict[str, int], rounds: int = 1) -> None:
    """Feed the text branch by branch, one token a call, siblings in turn."""
    view = view_text(TEXT, strict=True)
    tokens = [
        (int(view.layout.position_ids[i]) + 1000 * turn, stretch.branch, ids[view.pieces[i]])
        for turn in range(rounds)
        for stretch in view.stretches
        for i in range(stretch.start, stretch.end)
    ]
    for _, branch, token in sorted(tokens):
        live.on_token(0, branch, [token])


def vocabulary() -> tuple[dict[str, int], list[str]]:
    pieces = list(dict.fromkeys(view_text(TEXT).pieces))
    return {piece: k for k, piece in enumerate(pieces)}, pieces


def test_plain_output_names_the_branch_of_each_line_and_loses_none() -> None:
    ids, pieces = vocabulary()
    output = io.StringIO()
    with LiveBranches(lambda tokens: "".join(pieces[t] for t in tokens), title="the task", output=output) as live:
        grow(live, ids)
    lines = output.getvalue().splitlines()
    assert lines[0] == "the task"
    assert [line.split("|")[1].strip() for line in lines if line.startswith("path 2.1 ")] == ["2.1: thirty"]
    path_2 = [line.split("|")[1].strip() for line in lines if line.startswith("path 2 ")]
    assert path_2 == ["2: split", "2.1: tens", "2.2: ones", "both", "together"]
    assert [line.split("|")[1].strip() for line in lines if line.startswith("root")][-2:] == ["done", "end"]
    assert "<" not in output.getvalue()


def test_columns_stand_side_by_side_with_nested_ones_inside() -> None:
    from rich.console import Console

    ids, pieces = vocabulary()
    live = LiveBranches(lambda tokens: "".join(pieces[t] for t in tokens), output=io.StringIO())
    grow(live, ids)
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(live.render())
    screen = console.export_text().splitlines()
    top = next(line for line in screen if "path 1 " in line)
    assert "path 2 " in top
    nested = next(line for line in screen if "path 2.1" in line)
    assert "path 2.2" in nested and nested.index("path 2.1") > top.index("path 1") + 20
    assert any("forty-two" in line for line in screen) and any("together" in line for line in screen)


def test_a_second_block_opens_new_columns() -> None:
    ids, pieces = vocabulary()
    live = LiveBranches(lambda tokens: "".join(pieces[t] for t in tokens), output=io.StringIO())
    grow(live, ids, rounds=2)
    from rich.console import Console

    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(live.render())
    screen = console.export_text()
    assert screen.count("path 1 ") == 2 and screen.count("forty-two") == 2
