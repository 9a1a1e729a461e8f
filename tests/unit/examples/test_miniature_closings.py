"""The paper in miniature: what tells what a block of a search is closed into."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

MINIATURE = Path(__file__).parents[3] / "examples" / "paper_in_miniature"
sys.path.insert(0, str(MINIATURE))

import answers  # noqa: E402
import closings  # noqa: E402
from answers import problem_sets  # noqa: E402
from closings import Closed, compare, read_tree  # noqa: E402
from search import Satisfiability, spell  # noqa: E402
from settings import FULL, runs, tokenizer  # noqa: E402
from tasks import check, sample_satisfiability  # noqa: E402
from training_rows import MOST_VARIABLES, RowConfig, RowMaker  # noqa: E402

from megatron_multiverse.errors import ConfigError  # noqa: E402
from megatron_multiverse.structure import parse  # noqa: E402

CLOSING = re.compile(r"\n(\S+)\n</Conclusion>\n</Parallel>\n(\S+)")
"""A conclusion and what follows its block."""


def test_links_back_tell_what_every_block_is_closed_into() -> None:
    rng = random.Random(1)
    for number, num_given in ((3, 0), (5, 0), (6, 0), (6, 2)):
        problem = replace(sample_satisfiability(rng, number, num_given), back_links=True)
        text = problem.response("tagged")
        assert check(problem, text)
        found = CLOSING.findall(text)
        link_of = dict(re.findall(r"([A-Z])([a-z.]): ", problem.prompt))
        assert list(link_of) == list(problem.variables) and len(found) == text.count("<Parallel>")
        before = [*"." * (num_given + 1), *problem.variables[num_given:-1].lower()]
        assert list(link_of.values()) == before
        for conclusion, next_line in found:
            name, link = conclusion[-2:]
            assert conclusion[0] == name and link_of[name] == link
            assert next_line == "</Think>" if link == "." else re.fullmatch(rf"{link.upper()}[01][+-]", next_line)


def test_links_back_change_nothing_else() -> None:
    problem = sample_satisfiability(random.Random(2), 5, 1)
    linked = replace(problem, back_links=True)
    assert linked.answer == problem.answer and linked.response("plain") == problem.response("plain")
    assert re.sub(r"([A-Z])[a-z.]:", r"\1:", linked.prompt) == problem.prompt
    assert re.sub(r"[A-Z][a-z.]\n</Conclusion>", "\n</Conclusion>", linked.response("tagged")) == problem.response(
        "tagged"
    )
    small = Satisfiability("DEY", ((("D", 0), ("E", 0), ("Y", 0)),), back_links=True)
    assert small.prompt == "Set D, never D.: >E; Ed: >Y; Ye: aD0E0Y0 >."
    assert "\nY0-Y1+Ye\n</Conclusion>\n</Parallel>\nE0+\n" in small.response("tagged")
    assert "\nD0+D1+D.\n</Conclusion>\n</Parallel>\n</Think>\n" in small.response("tagged")


def test_rows_and_evaluation_of_a_run_have_links_back_alike() -> None:
    for name, has_links in (("given-values-0", False), ("back-links-0", True), ("back-links-1", True)):
        rows = runs()[name]
        assert rows.given_values and rows.back_links is has_links
        maker, rng = RowMaker(rows, tokenizer()), random.Random(3)
        prompts = [prompt for prompt, _ in (maker.text(rng, 5000) for _ in range(100)) if "never" in prompt]
        prompts += [
            one.prompt for name, of in problem_sets(3, rows).items() if name.startswith("variables") for one in of
        ]
        assert len(prompts) > 20
        assert all(bool(re.search("[A-Z][a-z.]: ", prompt)) is has_links for prompt in prompts)


def test_without_links_back_the_number_of_levels_tells_the_end_in_training_and_not_beyond() -> None:
    """Why a model without them ends its answer once it has closed as many levels as training ever shows."""
    maker, rng = (
        RowMaker(RowConfig(kind="multiverse", given_values=True, random_labels=False), tokenizer()),
        random.Random(4),
    )
    rows = [text for prompt, text in (maker.text(rng, 5000) for _ in range(400)) if "never" in prompt]
    deeper = sample_satisfiability(random.Random(5), MOST_VARIABLES + 1).response("tagged")
    ends: dict[str, dict[int, set[bool]]] = {}
    for name, texts in (("training", rows), ("beyond", [deeper])):
        ends[name] = defaultdict(set)
        for text in texts:
            for block in read_tree(text)[1].values():
                ends[name][block.levels].add(block.next_line == "</Think>")
    assert max(ends["training"]) == MOST_VARIABLES and ends["training"][MOST_VARIABLES] == {True}
    assert ends["training"][MOST_VARIABLES - 1] == {True, False}, "fewer levels do not tell it"
    assert ends["beyond"][MOST_VARIABLES] == {False} and ends["beyond"][MOST_VARIABLES + 1] == {True}


def test_low_trees_end_and_do_not_end_after_every_number_of_levels_but_the_greatest() -> None:
    rows = runs()["low-trees-0"]
    assert rows.low_trees and rows.back_links and rows == replace(runs()["back-links-0"], low_trees=True)
    maker, rng = RowMaker(rows, tokenizer()), random.Random(7)
    shown = [row for row in (maker.text(rng, 5000) for _ in range(400)) if "never" in row[0]]
    ends, asked = defaultdict(set), defaultdict(int)
    for prompt, text in shown:
        variables = re.findall(r"([A-Z])[a-z.]: ", prompt)
        given = re.match(r"Set ((?:[A-Z][01])*)", prompt)
        assert given is not None and 3 <= len(variables) <= 6 and len(given[1]) in (0, 2, 4)
        asked[len(variables) - len(given[1]) // 2] += 1
        for conclusion, next_line in CLOSING.findall(text):
            assert (conclusion[-1] == ".") is (next_line == "</Think>")
    maker = RowMaker(replace(rows, random_labels=False), tokenizer())
    for _, text in (row for row in (maker.text(rng, 5000) for _ in range(400)) if "never" in row[0]):
        for block in read_tree(text)[1].values():
            ends[block.levels].add(block.next_line == "</Think>")
    assert dict(ends) == {1: {True, False}, 2: {True, False}, 3: {True, False}, MOST_VARIABLES: {True}}
    assert set(asked) == {1, 2, 3, 4} and min(asked.values()) > len(shown) / 8
    assert maker.samples(rng, 5000, 20), "the engine would fork every one of them"
    with pytest.raises(AssertionError, match="needs two values that are given"):
        RowConfig(kind="multiverse", low_trees=True)


def test_an_answer_that_ends_one_level_too_soon_is_read() -> None:
    problem = sample_satisfiability(random.Random(6), 5)
    wanted = problem.response("tagged")
    paths, blocks = read_tree(wanted)
    first = problem.variables[0]
    assert blocks[""] == Closed(5, "</Think>") and blocks["1"] == Closed(4, blocks["1"].next_line)
    assert blocks["1"].next_line.startswith(f"{first}0") and blocks["2"].next_line.startswith(f"{first}1")
    assert paths["1"] == f"{first}0: >{problem.variables[1]}" and len(paths) == wanted.count("<Path>")
    whole = compare([(wanted, wanted)])
    assert whole["paths"] == {"right": len(paths), "of": len(paths)}
    assert all(count["right"] == count["of"] and not count["ended"] for count in whole["closings"].values())
    verdict = f"</Parallel>\n{blocks['1'].next_line}\n"
    broken = wanted.replace(verdict, f"</Parallel>\n</Think>\n\nAnswer: {problem.answer}\n", 1)
    found = compare([(wanted, broken)])
    assert found["paths"] == whole["paths"] and found["closings"]["5"] == whole["closings"]["5"]
    assert found["closings"]["4"] == {"of": 2, "right": 1, "ended": 1} and not whole["wrong"]
    right = blocks["1"].next_line
    lines = {"right": right, "outermost": right, "written": "</Think>"}
    assert found["wrong"] == [{"problem": 0, "path": "1", "levels": 4} | lines]
    inner = blocks["2.1"]
    other = wanted.replace(
        f"</Parallel>\n{inner.next_line}\n</Path>\n<Path>\n2.2: ",
        f"</Parallel>\n{blocks['2'].next_line}\n</Path>\n<Path>\n2.2: ",
        1,
    )
    found = compare([(wanted, wanted), (wanted, other)])
    lines = {"right": inner.next_line, "outermost": blocks["2"].next_line, "written": blocks["2"].next_line}
    assert found["wrong"] == [{"problem": 1, "path": "2.1", "levels": 3} | lines] and lines["right"] != lines["written"]
    cut = wanted[: wanted.rindex("\n2: ")]  # what was never written is not right, and no end either
    found = compare([(wanted, cut)])
    assert found["paths"]["right"] < found["paths"]["of"]
    assert found["closings"]["4"] == {"of": 2, "right": 1, "ended": 0} and not found["wrong"]


def test_blocks_count_as_closed_that_their_tag_closes_which_the_parser_does_not_tell() -> None:
    made, text = tokenizer(), sample_satisfiability(random.Random(6), 5).response("tagged")

    def parsed(text: str) -> int:
        return len(list(parse(made.tokenize(text), made.structure_vocab, strict=False).walk()))

    whole = read_tree(text)[1]
    assert len(whole) == parsed(text)
    cut = text[: text.rindex("\n2: ")]
    assert set(whole) - set(read_tree(cut)[1]) == {"", *(label for label in whole if label.startswith("2"))}
    assert parsed(cut) == len(read_tree(cut)[1]) + 1, "the outermost block, which the text ends in"
    broken = text.replace("</Outline>\n</Goal>", "</Outline>", 1)
    assert read_tree(broken)[1] == whole and parsed(broken) == len(whole) - 1


def test_closings_are_counted_over_the_sets_of_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tokenizer()

    class Right:
        """Answers all but the first problem right."""

        tokenizer = made

        def __init__(self, folder: Path, kind: str, size: object) -> None:
            assert folder == tmp_path / "model" and kind == "multiverse" and size is FULL

        def answer(self, problems: list[Satisfiability], mode: str) -> tuple[list[SimpleNamespace], float]:
            texts = [one.response("tagged") for one in problems]
            texts[0] = texts[0].rpartition("Answer: ")[0]
            return [SimpleNamespace(token_ids=made.tokenize(text)) for text in texts], 0.0

        is_right = answers.Answerer.is_right
        where_wrong = answers.Answerer.where_wrong
        kind = "multiverse"

    monkeypatch.setattr(answers, "Answerer", Right)
    output = tmp_path / "found.json"
    command = ["closings.py", "--run", "back-links-0", "--output", str(output), "--problems", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--model", str(tmp_path / "model")])
    closings.main()
    found = json.loads(output.read_text())
    assert found["run"] == "back-links-0" and list(found["sets"]) == ["variables-4", "variables-5"]
    assert found["sets"]["variables-5"]["right"] == [0, 1] and found["sets"]["variables-5"]["closings"]["5"]["of"] == 2
    assert "'Answer: ' comes" not in found["sets"]["variables-4"]["first_wrong"]
    monkeypatch.setattr(sys, "argv", [*command, "--model", str(tmp_path / "model"), "--sets", "variables-6"])
    closings.main()
    deeper = json.loads(output.read_text())["sets"]
    assert list(deeper) == ["variables-6"] and deeper["variables-6"]["closings"]["6"] == {
        "of": 2,
        "right": 2,
        "ended": 0,
    }
    assert "back-links-0 variables-4: 1 of 2 right" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--sets", "chains-4"])
    with pytest.raises(ConfigError, match="searches are variables-3"):
        closings.main()
    monkeypatch.setattr(sys, "argv", ["closings.py", "--run", "plain-0", "--output", str(output)])
    with pytest.raises(ConfigError, match="known are multiverse-0"):
        closings.main()


def test_given_values_are_spelled_in_front() -> None:
    problem = replace(sample_satisfiability(random.Random(9), 6, 2), back_links=True)
    assert problem.prompt.startswith(
        f"Set {spell(problem.given)}{problem.variables[2]}, never {problem.variables[0]}.: "
    )
