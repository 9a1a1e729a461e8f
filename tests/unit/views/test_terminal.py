"""Branches on the terminal: columns that nest, and plain lines where there is no terminal."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

from megatron_multiverse.structure import Block, render
from megatron_multiverse.views.sample_view import view_text
from megatron_multiverse.views.terminal import LiveBranches

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


def shown(live: LiveBranches) -> str:
    """The screen as text."""
    from rich.console import Console

    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(live.render())
    return console.export_text()


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
    ids, pieces = vocabulary()
    live = LiveBranches(lambda tokens: "".join(pieces[t] for t in tokens), output=io.StringIO())
    grow(live, ids)
    screen = shown(live).splitlines()
    top = next(line for line in screen if "path 1 " in line)
    assert "path 2 " in top
    nested = next(line for line in screen if "path 2.1" in line)
    assert "path 2.2" in nested and nested.index("path 2.1") > top.index("path 1") + 20
    assert any("forty-two" in line for line in screen) and any("together" in line for line in screen)


def test_a_second_block_opens_new_columns() -> None:
    ids, pieces = vocabulary()
    live = LiveBranches(lambda tokens: "".join(pieces[t] for t in tokens), output=io.StringIO())
    grow(live, ids, rounds=2)
    screen = shown(live)
    assert screen.count("path 1 ") == 2 and screen.count("forty-two") == 2


def test_characters_of_several_tokens_appear_whole() -> None:
    """Every token is one byte, so an accented letter takes two tokens and an emoji four; two branches write in turn."""

    def detokenize(ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    texts = {"1": "\n<Path>\n1: naïve 🙂 ok\n</Path>", "2": "\n<Path>\n2: déjà 👍🏽 vu\n</Path>"}
    output = io.StringIO()
    seen = []
    with LiveBranches(detokenize, output=output) as live:
        for pair in itertools.zip_longest(*(text.encode() for text in texts.values())):
            for branch, token in zip(texts, pair, strict=True):
                if token is not None:
                    live.on_token(0, branch, [token])
                    seen.append(shown(live))
        live.on_token(0, "", list("end 🙂".encode())[:-1])
    lines = output.getvalue().splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("path")] == [
        "1: naïve 🙂 ok",
        "2: déjà 👍🏽 vu",
    ]
    assert not any("\ufffd" in screen for screen in seen)
    assert "naïve 🙂 ok" in seen[-1] and "déjà 👍🏽 vu" in seen[-1]
    assert lines[-1].endswith("end \ufffd")  # cut off for good: the text ends inside a character


def test_a_long_branch_is_not_decoded_again_for_each_token() -> None:
    lengths = []

    def detokenize(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return bytes(ids).decode("utf-8", errors="replace")

    with LiveBranches(detokenize, output=io.StringIO()) as live:
        for token in b"word " * 200:
            live.on_token(0, "", [token])
    assert max(lengths) < 10


SCRIPTS = [
    "答えは四十二です。「漢字」",
    "한국어 답변",
    "مرحبا بالعالم، الجواب ٤٢",
    "שלום עולם",
    "नमस्ते दुनिया, उत्तर ४२",
    "สวัสดีชาวโลก",
    "e\u0301 o\u0308 n\u0303",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇯🇵 👍🏽 1️⃣ ❤️",
]


def grow_bytes(live: LiveBranches, texts: Sequence[str]) -> None:
    """One path per text, siblings in turn, one byte a token: characters fall into pieces."""
    for ids in itertools.zip_longest(*(f"<Path>\n{k + 1}: {text}\n".encode() for k, text in enumerate(texts))):
        for k, byte in enumerate(ids):
            if byte is not None:
                live.on_token(0, str(k + 1), [byte])


def from_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def test_every_script_comes_whole_and_the_columns_stay_straight() -> None:
    from rich.cells import cell_len

    for pair in itertools.combinations(SCRIPTS, 2):
        live = LiveBranches(from_bytes, output=io.StringIO())
        grow_bytes(live, pair)
        screen = shown(live)
        assert "\ufffd" not in screen
        for text in pair:
            assert text in screen
        boxes = [line for line in screen.split("\n") if line and line[0] in "╭│╰"]
        assert len(boxes) >= 3
        assert {cell_len(line) for line in boxes} == {100}
    output = io.StringIO()
    with LiveBranches(from_bytes, output=output) as live:
        grow_bytes(live, SCRIPTS)
    for k, text in enumerate(SCRIPTS):
        assert f"path {k + 1}     | {k + 1}: {text}\n" in output.getvalue()


def test_what_a_model_writes_does_not_steer_the_terminal() -> None:
    text = "red \x1b[31m, clear \x1b[2J, back\r\b, bell \a, csi \x9b2J, override \u202eabc, del \x7f, tab\tend"
    output = io.StringIO()
    with LiveBranches(from_bytes, output=output) as live:
        grow_bytes(live, [text])
        screen = shown(live)
    for written in (screen, output.getvalue()):
        assert not any(char in written for char in "\x1b\r\b\a\x9b\u202e\x7f\t")
        assert "␛[31m" in written and "tab    end" in written


def test_a_path_that_ends_ends_what_it_forked() -> None:
    """As when a try is dropped in the midst of a block of its own."""
    live = LiveBranches(from_bytes, output=io.StringIO())
    for branch, text in [("1", "a"), ("2", "b"), ("2.1", "c"), ("2.2", "d"), ("2", "\n</Path>")]:
        live.on_token(0, branch, list(text.encode()))
    assert "branches writing at once" not in shown(live)
    assert "path 2.1 ✓" in shown(live) and "path 1 …" in shown(live)
