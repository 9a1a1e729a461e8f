"""Distance, independence and the final answer."""

from __future__ import annotations

import pytest

from megatron_multiverse.curation.checks import dependences, distance, final_answer, same_answer
from megatron_multiverse.structure import Block


def test_distance_is_a_share_of_the_longer_text() -> None:
    assert distance("abcd", "abcd\n") == 0
    assert distance("abcd", "abcx") == 0.25
    assert distance("", "abc") == 1
    assert distance("ab", "abcdefgh") == 0.75


def block(*paths: str) -> Block:
    return Block(("o",) * len(paths), tuple((path,) for path in paths), "c")


@pytest.mark.parametrize(
    ("paths", "before", "sign"),
    [
        (("Try this.", "Alternatively, try that."), "", 'path 2 begins with "Alternatively"'),
        (("As in path 2 below.", "x"), "", 'path 1 says "path 2"'),
        (("x", "The previous case gave more."), "", 'path 2 says "The previous case"'),
        (("So it is = 1234.", "With 1234 we go on."), "", "path 2 uses 1234, which path 1 works out"),
    ],
)
def test_signs_of_dependence(paths: tuple[str, ...], before: str, sign: str) -> None:
    (found,) = dependences(block(*paths), before)
    assert found.startswith(sign)


@pytest.mark.parametrize(
    ("paths", "before"),
    [
        (("Alternatively, this.", "That."), ""),  # the first path leads over from the text before
        (("So it is = 1234.", "With 1234 we go on."), "the year 1234"),  # known before
        (("So it is = 1234.", "It is = 1234, and 1234 is even."), ""),  # worked out again
        (("So it is = 12.", "With 12 we go on."), ""),  # too short to tell
        (("The first case.", "A second case, in another way."), ""),
    ],
)
def test_independent_paths_have_no_sign(paths: tuple[str, ...], before: str) -> None:
    assert not list(dependences(block(*paths), before))


def test_inner_blocks_are_looked_at_with_what_they_see() -> None:
    inner = block("It is = 5678.", "Take 5678.")
    outer = Block(("o", "p"), (("text", inner), ("other",)), "c")
    assert list(dependences(outer, "")) == ["path 1.2 uses 5678, which path 1.1 works out"]
    assert not list(dependences(Block(("o", "p"), (("5678 is", inner), ("other",)), "c"), ""))


def test_the_final_answer_is_the_last_box_or_the_last_line() -> None:
    assert final_answer(r"\boxed{1} and \boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert final_answer("a\nthe end \n") == "the end"


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        (r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", True),
        (r"\boxed{3}", r"\boxed{4}", False),
        (r"no box 4", r"\boxed{4}", False),
        ("x\nthus 4", "y\nthus  4", True),
        ("x\nthus 4", "y\nthus 5", False),
    ],
)
def test_answers_are_compared_by_value(ours: str, theirs: str, same: bool) -> None:
    assert same_answer(ours, theirs) is same
