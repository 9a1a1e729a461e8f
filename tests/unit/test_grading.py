"""Answers as responses state them, and what math-verify 0.9.0 (latex2sympy2_extended 1.11.0) makes of them."""

from __future__ import annotations

import threading
import time
from importlib.metadata import version

import pytest
from math_verify import parse, verify

from megatron_multiverse.grading import boxes, gold_answer, is_right, stated_answer, stated_letter


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{3}, which is wrong. Then \boxed{4}", "4"),
        (r"\boxed{3} and \boxed{4}", "3, 4"),
        (r"$\boxed{3}$, $\boxed{4}$ or $\boxed{5}$.", "3, 4, 5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"\boxed{1} but \boxed{2 is cut off", "1"),
        (r"\boxed{\boxed{7}}", r"\boxed{7}"),
        ("Answer: 5\nno\nAnswer:  A = 1; B = 2", "A = 1; B = 2"),
        ("the final answer is 12", "12"),
        ("nothing of the kind", None),
        (r"<Think>\boxed{3}</Think> I do not know", None),
        (r"<Think>\boxed{3} it goes on", "3"),
        ("", None),
        # what stands between boxes, and boxes that come again
        (r"\boxed{7}\text{ and }\boxed{8}", "7, 8"),
        (r"\boxed{7} \quad\text{or}\quad \boxed{8}", "7, 8"),
        ("$$\\boxed{7}$$\n\n$\\boxed{7}$", "7"),
        (r"x \\boxed{7} \\\boxed{8}", "8"),
        # full stops and bold are no part of an answer
        ("Answer: 42.", "42"),
        ("**Answer: 42.**", "42"),
        ("the final answer is: **42**.", "42"),
        ("**Final Answer**: 42", "42"),
        ("The answer is 42.", "42"),
        ("Answer: 0.333...", "0.333..."),
        (r"\boxed{42.}", "42"),
        # of models that write the tag in small letters, too
        ("<think>\\boxed{3}</think>\nAnswer: 4", "4"),
    ],
)
def test_the_stated_answer(text: str, answer: str | None) -> None:
    assert stated_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: B", "B"),
        ("**Answer: (C)**", "C"),
        (r"Answer: $\boxed{D}$", "D"),
        (r"\boxed{\text{A}}", "A"),
        ("The answer is A. No, the correct answer is B.", "B"),
        ("Answer: E", None),
        ("Answer: Because", None),
        ("An answer: a thing", None),
        ("<Think>Answer: A</Think>\nAnswer: D", "D"),
        ("no letter", None),
        ("Answer: b", "B"),
        ("answer: (c), since", "C"),
        ("The answer is option D.", "D"),
        ("Answer: Choice C", "C"),
        ("Answer: a\n\nIt is a good one", "A"),
        ("<think>Answer: A</think>\nAnswer: D", "D"),
    ],
)
def test_the_stated_letter(text: str, letter: str | None) -> None:
    assert stated_letter(text, "ABCD") == letter


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\dfrac12", r"\frac{1}{2}", True),
        ("3/2", r"1 \frac{1}{2}", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("204", "0204", True),
        ("1000", "1,000", True),
        ("3", "4", False),
        ("3", None, False),
        ("3", "", False),
        # intervals, tuples, sets: math-verify alone takes (1,2) and {1,2} for equal
        ("(1,2)", "(1, 2)", True),
        ("(1,2)", "(2,1)", False),
        ("(1,2)", "[1,2]", False),
        ("[2,5)", "[2,5]", False),
        ("(1,2)", r"\{1,2\}", False),
        (r"\{1,2\}", "(1,2)", False),
        (r"\left(1,2\right)", "(1,2)", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("3, 4", "4, 3", True),
        ("4", "3, 4", False),
        # not symmetric
        ("1<x<2", "(1,2)", True),
        ("(1,2)", "1<x<2", False),
        ("1/3", "0.333333", True),
        ("0.333", "1/3", False),
        # percentages and units do not count, not even wrong ones
        (r"50\%", "50", True),
        (r"50\%", "0.5", True),
        (r"5\text{ cm}", "5", True),
        (r"5\text{ cm}", r"5\text{ m}", True),
        (r"90^\circ", "90", True),
        ("2516_8", "2516", True),
        # words
        (r"\text{Evelyn}", "Evelyn", True),
        (r"\text{Evelyn}", r"\text{Bob}", False),
        ("x=5", "5", True),
        ("x=5", "y=5", False),
        ("A = 1; B = 2", "A =  1; B = 2", True),
        ("A = 1; B = 2", "A = 1; B = 3", False),
        # words in \\text or not, which math-verify tells apart where there are digits among them
        (r"\text{June 20}", "June 20", True),
        ("June 20", r"\text{June 20}", True),
        (r"\text{June 20}", "June 21", False),
        # spaces between thousands
        ("1234", r"1\,234", True),
        ("1234", r"1,\!234", True),
        (r"(1,\,234)", r"(1,234)", True),
        # small numbers, which math-verify rounds to six decimals
        (r"1.6\times10^{-19}", r"9.11\times10^{-31}", False),
        (r"1.6\times10^{-19}", r"1.60\times 10^{-19}", True),
        ("0.0000001", "0.0000003", False),
        ("0.000000001", "0", False),
        ("0", "0.0", True),
        ("0.0001", "10^{-4}", True),
        (r"0.05\%", "0.0005", True),
        ("(0.0000001, 2)", "(0.0000003, 2)", False),
        (r"\{0.0000003, 2\}", r"\{2, 0.0000001\}", False),
        (r"\{0, 0.0001\}", r"\{\frac{1}{10000}, 0\}", True),
        ("2i", "2i", True),
        ("5", "9^{9^{9^{9}}}", False),  # a number that nobody works out
        # repeating decimals
        (r"0.\overline{3}", r"\frac13", True),
        (r"\frac13", r"$0.\overline{3}$", True),
        (r"-0.1\overline{6}", r"-\frac{1}{6}", True),
        (r"1.2\overline{34}", r"\frac{1222}{990}", True),
        (r"0.\overline{3}", "0.3", False),
    ],
)
def test_right_answers(gold: str, answer: str | None, right: bool) -> None:
    assert is_right(gold, answer) is right


def test_a_response_that_says_the_same_without_end_is_graded_at_once() -> None:
    """Models get stuck; regular expressions that try every way to read such a text would take hours."""
    for text in ("\\boxed{" * 20_000, "Answer:" + " \n" * 20_000, r"\boxed{1}" * 5_000, "Answer: 1" + " ." * 20_000):
        started = time.process_time()
        stated_answer(text)
        stated_letter(text, "ABCD")
        assert time.process_time() - started < 10  # a tenth of a second; minutes, or hours, the other way


def test_a_right_answer_of_a_file_has_no_full_stop_either() -> None:
    assert [gold_answer(text) for text in ("42.", r"So it is $\boxed{42.}$.", "0.5 ")] == ["42", "42", "0.5"]


def test_boxes_have_their_places() -> None:
    text = r"a \boxed{1} \fbox{2}"
    assert [(text[box.start : box.end], box.content) for box in boxes(text)] == [
        (r"\boxed{1}", "1"),
        (r"\fbox{2}", "2"),
    ]


VERSIONS = {"math-verify": "0.9.0", "latex2sympy2_extended": "1.11.0"}
"""What the surprises below were found with."""


def test_surprises_are_those_of_the_installed_version() -> None:
    """Where this fails, run the tests below with the new version, see what they say, and write it into `VERSIONS`."""
    assert {name: version(name) for name in VERSIONS} == VERSIONS


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        (
            "(1,2)",
            r"\{1,2\}",
            True,
        ),  # an open interval or a tuple, and a set: `same_value` compares the brackets itself
        ("(1,2)", "[1,2]", False),
        ("1<x<2", "(1,2)", True),  # not symmetric: the gold answer comes first
        ("(1,2)", "1<x<2", False),
        ("1/3", "0.333333", True),
        ("0.333", "1/3", False),
        (r"50\%", "50", True),
        (r"50\%", "0.5", True),
        ("50", r"50\%", True),
        (r"5\text{ cm}", r"5\text{ m}", True),  # no units
        ("2516_8", "2516", True),  # no bases
        ("7:30", "7/30", True),  # no times of day
        ("1e3", "1000", False),  # e is Euler's number, not an exponent
        (r"\pi", "3.14159", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)", False),
        ("3", "3.", False),  # no full stops: `stated_answer` takes them away
        (r"\text{June 20}", "June 20", False),  # no words with digits: `is_right` compares words itself
        ("10000", r"10,\!000", True),
        ("1234", r"1\,234", False),  # no spaces between thousands: `same_value` takes them away
        ("1,234", "1234", True),
        ("1,234", "1, 234", False),
        ("0.0000001", "0.0000003", True),  # six decimals: `same_value` compares small numbers itself
        (r"\frac13", r"0.\overline{3}", False),  # no repeating decimals: `same_value` makes fractions of them
        ("7", "7, 7", True),  # a set
        ("x=5", "5", True),
        ("A = 1; B = 2", "A =  1; B = 2", True),
    ],
)
def test_what_math_verify_takes_for_equal(gold: str, answer: str, equal: bool) -> None:
    assert verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}")) is equal


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"So $\boxed{3}$. Wait, no: it is $\boxed{4}$.", "4"),
        (r"\boxed{3} and \boxed{4}", "3,4"),  # boxes side by side are one set; gold 3 and gold 4 are then both wrong
        # So are boxes with words between them where no dollar stands there, also words that take the first one back:
        # `stated_answer` looks for the boxes itself, and its answer alone is ever parsed.
        (r"\boxed{3} and then \boxed{4}", "3,4"),
        (r"\boxed{3}, which is wrong. Then \boxed{4}", "3,4"),
        (r"\boxed{}", None),
        ("nothing of the kind", None),
    ],
)
def test_what_math_verify_finds_in_a_text(text: str, found: str | None) -> None:
    assert (parse(text) or [None])[-1] == found


def test_math_verify_wants_the_main_thread() -> None:
    errors: list[str] = []

    def grade() -> None:
        try:
            is_right("3", "4")
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "signal.alarm" in errors[0]
