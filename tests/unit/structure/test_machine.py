"""The grammar: strict errors with their place, tolerant reading of anything, fork and join."""

from __future__ import annotations

import re
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from megatron_multiverse.errors import ConfigError, StructureError
from megatron_multiverse.structure import (
    TAGS,
    Event,
    StructureMachine,
    StructureVocab,
    Tag,
    last_thought,
    lay_out,
    opens_thought,
    parse,
    parse_text,
    visible_matrix,
)

PIECES = [*TAGS, "\n", "1:", "2:", "3:", "1.1:", "2.1:", "2.", "a", "b"]
VOCAB = StructureVocab.from_pieces(PIECES)
GOOD = """<Think>
a
<Parallel>
<Goal>
<Outline>
1: a
</Outline>
<Outline>
2: b
</Outline>
</Goal>
<Path>
1: a
</Path>
<Path>
2: b
</Path>
<Conclusion>
ab
</Conclusion>
</Parallel>
</Think>"""


def ids_of(text: str) -> list[int]:
    """Longest piece first, blanks dropped."""
    text = text.replace(" ", "")
    ids = []
    while text:
        piece = max((piece for piece in PIECES if text.startswith(piece)), key=len)
        ids.append(PIECES.index(piece))
        text = text[len(piece) :]
    return ids


def test_strict_accepts_the_canonical_form() -> None:
    document = parse(ids_of(GOOD), VOCAB)
    assert [path.label for path in document.blocks[0].paths] == ["1:", "2:"]
    assert not document.malformed


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("</Goal>\n<Path>", "</Goal>\n\n<Path>", "gap"),
        ("</Goal>\n<Path>", "</Goal><Path>", "gap"),
        ("</Goal>\n<Path>", "</Goal>\na\n<Path>", "gap"),
        ("<Path>\n2:", "<Path>\n3:", "label_order"),
        ("<Outline>\n2:", "<Outline>\n3:", "label_order"),
        ("<Path>\n2: b", "<Path>\nb", "label"),
        ("<Path>\n2: b", "<Path> b", "label"),
        ("<Path>\n2: b\n</Path>\n", "", "path_count"),
        ("</Path>\n<Conclusion>", "</Path>\n<Path>\n3: a\n</Path>\n<Conclusion>", "path_count"),
        ("2: b\n</Path>", "2: b\n</Path>\n</Path>", "stray_tag"),
        ("2: b\n</Path>", "2: b", "stray_tag"),
        ("<Think>\na", "<Think>\n<Think>\na", "stray_tag"),
        ("\n</Think>", "", "unclosed"),
        ("</Conclusion>\n</Parallel>\n</Think>", "", "unclosed"),
        ("</Conclusion>\n</Parallel>", "</Parallel>", "unclosed_conclusion"),
        ("</Conclusion>\n</Parallel>", "</Conclusion>\n</Think>", "unclosed_conclusion"),
        ("</Conclusion>\n</Parallel>", "</Conclusion>\na</Parallel>", "gap"),
        ("<Conclusion>\nab\n</Conclusion>\n", "", "no_conclusion"),
        ("<Goal>\n", "", "broken_header"),
        ("2: b\n</Outline>", "2: b\n", "broken_header"),
        ("<Outline>\n1: a\n</Outline>\n<Outline>\n2: b\n</Outline>\n", "", "no_outline"),
        ("</Goal>", "</Goal>\n<Think>", "broken_header"),
    ],
)
def test_strict_names_the_broken_rule_and_its_place(old: str, new: str, code: str) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    with pytest.raises(StructureError) as caught:
        parse(ids_of(text), VOCAB, sample="row 7")
    error = caught.value
    assert error.code == code
    assert "sample row 7" in str(error)
    assert f"token {error.token_index}" in str(error)
    # Everything before the place named is still fine: cut there, the only fault is the end of the text.
    with pytest.raises(StructureError) as cut:
        parse(ids_of(text)[: error.token_index], VOCAB)
    assert cut.value.code == "unclosed"
    # The text side finds the same fault and says the character.
    with pytest.raises(StructureError) as in_text:
        parse_text(text)
    assert in_text.value.code == code
    assert in_text.value.char_index is not None
    # Tolerant reading goes on and counts it.
    assert parse(ids_of(text), VOCAB, strict=False).malformed[code] >= 1


@pytest.mark.parametrize(
    ("prompt", "thought", "opens"),
    [
        ("a<Think>\n", "open", True),
        ("<Think>a</Think>b<Think>", "open", True),
        ("a<Think>\n\n", "open", True),
        ("<Think>a<Path>", "open", False),
        ("what is <Think>\n?", "open", False),
        ("<Think>a</Think>b", "closed", False),
        ("<Think><eos>a", "none", False),
        ("a<Think>.b", "none", False),
        ("<Parallel>a", "none", False),
    ],
)
def test_a_response_may_close_the_thought_that_its_prompt_opened(prompt: str, thought: str, opens: bool) -> None:
    pieces = [*PIECES, "<eos>", ".", *sorted(set("what is ?") - {*PIECES})]
    vocab = StructureVocab.from_pieces(pieces, eos_id=pieces.index("<eos>"))
    before = [pieces.index(piece) for piece in re.findall("<.*?>|.|\n", prompt)]
    assert last_thought(before, vocab, [pieces.index(".")]) == thought
    assert opens_thought(before, vocab) is opens is opens_thought(np.array(before), vocab)
    body = GOOD.removeprefix("<Think>\n")
    for text, is_right in ((body, opens), (GOOD, True), (body.removesuffix("\n</Think>"), True)):
        document = parse([*before, *ids_of(text)], vocab, prompt_length=len(before), strict=False)
        assert (not document.malformed) == is_right and len(document.blocks[0].paths) == 2, text
    twice = parse([*before, *ids_of(f"{GOOD}\n</Think>")], vocab, prompt_length=len(before), strict=False)
    assert twice.malformed == Counter(stray_tag=1)


def test_what_the_prompt_opened_is_closed_where_that_is_asked_for() -> None:
    machine = StructureMachine(VOCAB)
    assert not machine.in_thought
    machine.begin_in_thought()
    for token in ids_of("a<Parallel>\n"):
        machine.push(token)
    assert machine.in_thought and machine.closing_ids() == ids_of("</Parallel>")
    assert machine.closing_ids(of_prompt=True) == ids_of("</Parallel>\n</Think>")
    for token in ids_of("</Parallel>\n</Think>"):
        machine.push(token)
    assert not machine.in_thought and machine.closing_ids(of_prompt=True) == []


def test_tags_in_the_prompt_are_inert() -> None:
    prompt = ids_of("<Path>a</Goal><Parallel>")
    document = parse([*prompt, *ids_of(GOOD)], VOCAB, prompt_length=len(prompt))
    assert document.blocks[0].start == len(prompt) + 4
    mask = lay_out(document).loss_mask()
    assert not mask[: len(prompt)].any()


def test_a_vocabulary_without_tags_is_refused() -> None:
    with pytest.raises(ConfigError, match="'</Goal>'"):
        StructureVocab.from_pieces([piece for piece in PIECES if piece != "</Goal>"])
    with pytest.raises(ConfigError, match="12 different"):
        StructureVocab((1, 2, 3), 4, {})


def test_limits_turn_a_block_into_text() -> None:
    ids = ids_of(GOOD)
    for limits, code in (({"max_depth": 0}, "too_deep"), ({"max_paths": 1}, "too_many_paths")):
        machine = StructureMachine(VOCAB, **limits)
        events = [machine.push(token) for token in ids]
        assert Event.FORK not in events
        assert machine.malformed[code] == 1
        assert machine.blocks == []
        assert parse(ids, VOCAB, strict=False, **limits).blocks == []


def run_as_branches(ids: list[int]) -> tuple[list[int], Counter[str]]:
    """Read `ids` as the engine does: one machine per branch. Returns the depth at each token, and the faults."""
    faults: Counter[str] = Counter()
    depths: list[int] = []

    def read(machine: StructureMachine, start: int) -> int:
        position = start
        while position < len(ids):
            event = machine.push(ids[position])
            depths.append(machine.depth)
            position += 1
            if event is Event.FORK:
                for k in range(len(machine.outlines)):
                    position = read(machine.fork(k), position)
                machine.join()
            if machine.ended:
                break
        faults.update(machine.malformed)
        return position

    read(StructureMachine(VOCAB), 0)
    return depths, faults


def test_branches_read_what_one_machine_reads() -> None:
    depths, faults = run_as_branches(ids_of(GOOD))
    document = parse(ids_of(GOOD), VOCAB)
    assert not faults
    expected = np.zeros(document.num_tokens, dtype=int)
    for path in document.blocks[0].paths:
        expected[path.start : path.end] = 1
    assert np.array_equal(np.array(depths), expected)


@pytest.mark.parametrize("length", range(len(ids_of(GOOD)) + 1))
def test_closing_ids_balance_a_text_cut_anywhere(length: int) -> None:
    machine = StructureMachine(VOCAB)
    ids = ids_of(GOOD)[:length]
    for token in ids:
        machine.push(token)
    closing = machine.closing_ids()
    counts = Counter(token for token in [*ids, *closing])
    for tag in range(0, len(TAGS), 2):
        assert counts[VOCAB.tag_ids[tag]] == counts[VOCAB.tag_ids[tag + 1]], TAGS[tag]
    for token in closing:
        machine.push(token)
    assert machine.closing_ids() == []


def test_skip_reads_plain_runs_at_once() -> None:
    ids = ids_of(GOOD)
    machine = StructureMachine(VOCAB)
    for token in ids:
        machine.push(token)
    assert machine.num_tokens == len(ids)
    assert machine.blocks == parse(ids, VOCAB).blocks


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=60))
def test_tag_soup_never_breaks_tolerant_reading(ids: list[int]) -> None:
    check_tolerant(ids)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_text_never_breaks_tolerant_reading(data: st.DataObject) -> None:
    """Soup seldom gets past a header; cut, doubled and swapped pieces of good text do."""
    ids = ids_of(GOOD)
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(ids) - 1))
        end = data.draw(st.integers(start, min(len(ids), start + 12)))
        put = data.draw(st.integers(0, len(ids)))
        piece = ids[start:end]
        if data.draw(st.booleans()):
            ids = ids[:start] + ids[end:]
        ids = ids[:put] + piece + ids[put:]
        if not ids:
            ids = [0]
    check_tolerant(ids)


def check_tolerant(ids: list[int]) -> None:
    document = parse(ids, VOCAB, strict=False)
    machine = StructureMachine(VOCAB)
    for token in ids:
        machine.push(token)
    machine.finish()
    assert machine.blocks == document.blocks
    assert machine.malformed == document.malformed
    layout = lay_out(document)
    visible = visible_matrix(layout)
    assert visible.diagonal().all()
    assert layout.num_visible_pairs == visible.sum()
    assert layout.position_ids.shape == (len(ids),)
    assert (layout.position_ids >= 0).all()
    # A token's position is the length of the longest chain of visible tokens before it.
    for i in range(len(ids)):
        before = np.flatnonzero(visible[i, :i])
        assert layout.position_ids[i] == (layout.position_ids[before].max() + 1 if before.size else 0)
    for _, block in document.walk():
        assert block.start < block.goal_end <= block.paths[0].start
        assert all(a.end == b.start for a, b in zip(block.paths, block.paths[1:], strict=False))
        assert block.region_end <= block.end <= len(ids)
    try:
        parse(ids, VOCAB)
    except StructureError:
        assert document.malformed
    else:
        assert not document.malformed


def test_event_of_each_tag() -> None:
    machine = StructureMachine(VOCAB)
    events = Counter(machine.push(token) for token in ids_of(GOOD))
    assert events[Event.FORK] == 1
    assert events[Event.PATH_END] == 2
    assert events[Event.BLOCK_END] == 1
    assert machine.push(VOCAB.tag_ids[Tag.END_PATH]) is Event.MALFORMED
