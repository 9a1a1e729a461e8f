"""The paper in miniature: its texts, its rows, its report."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

MINIATURE = Path(__file__).parents[3] / "examples" / "paper_in_miniature"
sys.path.insert(0, str(MINIATURE))

import miniature  # noqa: E402
import one_run  # noqa: E402
from chains import Chain, without_links  # noqa: E402
from miniature import STOPPED, MiniatureOptions, estimate, most_accurate, train_all  # noqa: E402
from official_mask import both_labels, leaky, two_labels  # noqa: E402
from paper_figures import fit_latency  # noqa: E402
from paper_report import draw, filled, read_results, tables  # noqa: E402
from search import Satisfiability, spell  # noqa: E402
from settings import FULL, SMOKE, runs, tokenizer  # noqa: E402
from tasks import check, sample_arithmetic, sample_satisfiability  # noqa: E402
from training_rows import MiniLoader, RowConfig, RowMaker, gapped, official_positions, with_positions  # noqa: E402

from megatron_multiverse.errors import CheckpointError, ConfigError, TrainingError  # noqa: E402
from megatron_multiverse.kernels.multiverse_attention import (  # noqa: E402
    BACKENDS,
    AttentionLayout,
    multiverse_attention,
    multiverse_attention_reference,
    visibility,
)
from megatron_multiverse.structure import (  # noqa: E402
    Tag,
    lay_out,
    pack_layouts,
    padding_layout,
    parse,
    parse_text,
)
from megatron_multiverse.structure.trajectory import lex  # noqa: E402


@pytest.mark.parametrize("text", ["plain", "tagged"])
def test_every_text_ends_with_a_right_answer(text: Any) -> None:
    rng = random.Random(0)
    for number in (2, 4, 12):
        problem = sample_arithmetic(rng, number)
        assert check(problem, problem.response(text))
        assert not check(problem, problem.response(text) + "0")
    for number in (3, 4, 6):
        search = sample_satisfiability(rng, number)
        assert check(search, search.response(text))


@pytest.mark.parametrize("number", [3, 4, 6])
def test_a_search_has_the_solutions_that_no_clause_rules_out(number: int) -> None:
    rng = random.Random(number)
    found = []
    for _ in range(20):
        problem = sample_satisfiability(rng, number)
        all_cases = ["".join(f"{name}{bit}" for name, bit in zip(problem.variables, bits, strict=True))
                     for bits in np.ndindex(*[2] * number)]  # fmt: skip
        ruled_out = {case for case in all_cases for clause in problem.clauses
                     if all(f"{name}{value}" in case for name, value in clause)}  # fmt: skip
        right = {case for case in all_cases if problem.is_right(case)}
        assert right == set(all_cases) - ruled_out and len(right) <= 1
        assert problem.is_right("no") is (not right) and problem.answer == next(iter(right), "no")
        assert not problem.is_right("") and not problem.is_right(f"{problem.variables[0]}0")
        assert all(len({name for name, _ in clause}) == 3 for clause in problem.clauses)
        found.append(len(right))
    assert 3 < sum(found) < 17


def test_a_search_tries_the_clauses_of_the_variable_that_just_got_its_value() -> None:
    problem = Satisfiability("DEYK", ((("D", 0), ("E", 0), ("Y", 0)), (("D", 0), ("E", 0), ("K", 1))), first_mark=25)
    assert problem.prompt == "Set D, never D: >E; E: >Y; Y: zD0E0Y0 >K; K: aD0E0K1 >."
    lines = problem.response("plain").splitlines()
    assert lines[1:5] == ["D0: >E", "D0E0: >Y", "D0E0Y0: zD0E0Y0-", "Y0-"]
    assert lines[5:8] == ["D0E0Y1: zD0E0Y0+>K", "D0E0Y1K0: aD0E0K1+>.", "K0+"] and lines[-1] == "Answer: D0E0Y1K0"
    tagged = problem.response("tagged")
    assert "\n1.1.2.2: D0E0Y1K1: aD0E0K1-\nK1-\n</Path>\n<Conclusion>\nK0+K1-\n" in tagged
    assert "\n2.1.1.1: D1E0Y0K0: aD0+>.\nK0+\n" in tagged
    assert tagged.endswith("D0+D1+\n</Conclusion>\n</Parallel>\n</Think>\n\nAnswer: D0E0Y1K0")


def test_values_that_the_question_gives_are_not_searched() -> None:
    rng = random.Random(5)
    found = set()
    for _ in range(30):
        problem = sample_satisfiability(rng, 5, 2)
        given = spell(problem.given)
        assert len(problem.given) == 2 and problem.prompt.startswith(f"Set {given}{problem.variables[2]}, never ")
        same = replace(problem, given=())
        wanted = {spell(case) for case in same.solutions() if spell(case).startswith(given)}
        assert problem.is_right(problem.answer) and problem.answer == next(iter(wanted), "no")
        for text in ("plain", "tagged"):
            response = problem.response(text)
            assert check(problem, response)
            cases = list(re.findall(r"^[\d.: ]*((?:[A-Z][01])+): ", response, re.MULTILINE))
            assert cases and all(case.startswith(given) and len(case) > 4 for case in cases)
        levels = [label.count(".") for label in re.findall(r"^([\d.]+): ", problem.response("tagged"), re.MULTILINE)]
        assert max(levels) <= 2
        found.add(problem.answer == "no")
    assert found == {True, False}


def test_rows_with_given_values_have_longer_cases_in_trees_no_deeper() -> None:
    rows = [RowMaker(RowConfig(kind="multiverse", given_values=given), tokenizer()) for given in (False, True)]
    for maker, most_literals in zip(rows, (4, 6), strict=True):
        rng = random.Random(6)
        responses = [text for prompt, text in (maker.text(rng, 5000) for _ in range(400)) if "never" in prompt]
        lengths = {len(case) // 2 for text in responses for case in re.findall(r" ((?:[A-Z][01])+): ", text)}
        assert max(lengths) == most_literals
        assert max(_depth(text) for text in responses) == 4


def _depth(text: str) -> int:
    """Blocks that are open at once."""
    steps = [1 if tag == "<Parallel>" else -1 for tag in re.findall(r"</?Parallel>", text)]
    return max(itertools.accumulate(steps))


def test_a_clause_is_compared_up_to_the_first_literal_that_the_case_does_not_have() -> None:
    rng = random.Random(4)
    for _ in range(10):
        problem = sample_satisfiability(rng, 4)
        clauses = dict(pair for name in problem.variables for pair in problem.marked(name))
        for line in problem.response("plain").splitlines()[1:]:
            case, colon, tried = line.partition(": ")
            if not colon or not re.fullmatch(r"(?:[A-Z][01])+", case):
                continue
            for mark, literals, verdict in re.findall(r"([a-z])((?:[A-Z][01])+)([+-])", tried):
                written = [literals[k : k + 2] for k in range(0, len(literals), 2)]
                clause = [f"{name}{value}" for name, value in clauses[mark]]
                assert written == clause[: len(written)]
                assert all(literal in case for literal in written[:-1])
                assert (written[-1] in case) is (verdict == "-")
                assert len(written) == 3 or verdict == "+"


def test_a_question_says_where_to_begin_and_each_name_which_chain_is_next() -> None:
    problem = sample_arithmetic(random.Random(5), 3, num_spare=4)
    begin, definitions = problem.prompt.removesuffix(".").split(". ", 1)
    link_of = {part[0]: part[1] for part in definitions.split("; ")}
    assert len(link_of) == 7 and sorted(link_of.values())[:2] == [".", "."]  # the chains that are asked for, and others
    found = [begin.removeprefix("Work out ")]
    while link_of[found[-1]] != ".":
        found.append(link_of[found[-1]].upper())
    assert found == [chain.name for chain in problem.chains] == [part[0] for part in problem.answer.split("; ")]
    assert all(f"{chain}" in problem.prompt for chain in problem.chains)
    assert f"\n<Outline>\n1: {found[0]}{found[1].lower()}\n" in problem.response("tagged")
    without = without_links(sample_arithmetic(random.Random(5), 3))
    assert without.prompt == f"Work out {'; '.join(map(str, without.chains))}."
    assert [part.split(":")[0] for part in without.answer.split("; ")] == found


def test_each_step_of_a_chain_begins_with_what_is_left_of_it() -> None:
    chain = Chain("M", 20, (("+", 15), ("*", 2)))
    first, second = (
        "ones: 0 + 5 + 0 = 5, write 5, carry 0, left 2 + 1",
        "tens: 2 + 1 + 0 = 3, write 3, carry 0, left 0 + 0",
    )
    third, fourth = (
        "ones: 5 * 2 + 0 = 10, write 0, carry 1, left 3 * 2",
        "tens: 3 * 2 + 1 = 7, write 7, carry 0, left 0 * 2",
    )
    assert chain.work().split("\n") == ["M20 + 15 * 2", first, second, "M35 * 2", third, fourth, "M:70"]
    assert chain.work(copies_rest=False).split("\n")[0] == "M20 + 15"
    linked = replace(chain, link="k").work().split("\n")
    assert [linked[0], linked[3], linked[-1]] == ["Mk20 + 15 * 2", "Mk35 * 2", "Mk:70"]
    assert Chain("M", 20, (), "k").work() == "Mk20\nMk:20"


def test_rows_have_few_paths_and_long_lists_no_block() -> None:
    maker = RowMaker(RowConfig(kind="multiverse"), tokenizer())
    rng = random.Random(3)
    first, later = ([maker.text(rng, index) for _ in range(300)] for index in (0, 5000))
    for rows, has_steps in ((first, False), (later, True)):
        assert any(" + " in prompt for prompt, _ in rows) is has_steps
        assert any("never" in prompt for prompt, _ in rows) is has_steps
        blocks = [text.split("</Goal>")[0].count("<Outline>") for _, text in rows if "<Parallel>" in text]
        lists = [text.split("Answer: ")[1].count(":") for _, text in rows if "<Parallel>" not in text]
        assert set(blocks) == {2, 3, 4} and max(lists) == 12
        assert all("in parallel" in prompt for prompt, text in rows if "<Parallel>" in text)
    without = RowMaker(RowConfig(kind="multiverse", long_lists=False, first_batches=0), tokenizer())
    rows = [without.text(rng, 0) for _ in range(100)]
    assert all("<Parallel>" in text for _, text in rows) and any("never" in prompt for prompt, _ in rows)


def test_labels_are_shifted_as_a_whole() -> None:
    problem = sample_satisfiability(random.Random(2), 4)
    counted, shifted = problem.response("tagged"), problem.response("tagged", "7.3.", (4, 5))
    assert "\n7.3.4: " in shifted and "\n7.3.5: " in shifted and "\n7.3.1" not in shifted and "\n7.3.6" not in shifted
    back = shifted.replace("\n7.3.4", "\n1").replace("\n7.3.5", "\n2")
    assert back == counted
    chains = sample_arithmetic(random.Random(2), 8)
    late = chains.response("tagged", "", range(12, 20))
    assert [f"\n{number}: " in late for number in range(10, 21)] == [False] * 2 + [True] * 8 + [False]
    assert parse_text(counted)  # strictly


def test_labels_with_gaps_rise_and_stand_in_goal_and_paths_alike() -> None:
    made: Any = {gaps: RowMaker(RowConfig(kind="multiverse", label_gaps=gaps), tokenizer()) for gaps in (False, True)}
    for gaps, maker in made.items():
        rng, steps = random.Random(4), []
        for _ in range(200):
            _, text = maker.text(rng, 0)
            goal, _, paths = text.partition("</Goal>")
            if not paths:
                continue  # a list, whose numbers stand in another order than their labels
            outlines, found = (re.findall(r"\n(?:\d+\.)*(\d+): ?[A-Z]", part) for part in (goal, paths))
            assert outlines == found[: len(outlines)]
            steps += np.diff(list(map(int, outlines))).tolist()
        assert set(steps) == ({1, 2, 3, 4} if gaps else {1})


def test_names_of_labelled_lists_are_found_by_their_labels() -> None:
    maker = RowMaker(RowConfig(kind="multiverse"), tokenizer())
    rng = random.Random(8)
    rows = [
        row
        for row in (maker.text(rng, index) for index in (0, 5000) for _ in range(100))
        if "in parallel" not in row[0]
    ]
    assert len(rows) > 40
    labels, in_order = set(), 0
    for prompt, text in rows:
        thought, _, answer = text.removeprefix("<Think>\n").partition("\n</Think>\n\nAnswer: ")
        names = dict(re.findall(r"^((?:\d+\.)*\d+): ([A-Z][a-z.])$", thought, re.MULTILINE))
        found = re.findall(r"^((?:\d+\.)*\d+): ([A-Z][a-z.])(\d+)\n\2:\3$", thought, re.MULTILINE)
        assert {label: name for label, name, _ in found} == names and len(found) == len(names)
        assert all(f"{name}{number}" in prompt for _, name, number in found)
        assert answer.split("; ") == [
            f"{name}:{number}" for want in names.values() for _, name, number in found if name == want
        ]
        labels |= set(names)
        in_order += [label for label, *_ in found] == list(names)
    assert max(int(label.split(".")[-1]) for label in labels) > 20 and in_order < len(rows) / 3
    plain, other = (
        RowMaker(RowConfig(kind="plain", labelled_lists=labelled), tokenizer()) for labelled in (True, False)
    )
    assert plain.text(random.Random(1), 0) == other.text(random.Random(1), 0)


def test_first_rows_become_fewer_over_as_many_batches_again() -> None:
    maker = RowMaker(RowConfig(kind="plain", first_batches=100), tokenizer())
    assert [maker.share_of_first_rows(index) for index in (0, 100, 150, 200, 900)] == [1, 1, 0.5, 0, 0]
    assert RowMaker(RowConfig(kind="plain", first_batches=0), tokenizer()).share_of_first_rows(0) == 0


def test_a_mixture_has_the_papers_share_of_rows_with_tags() -> None:
    config = RowConfig(kind="multiverse", mixture_batches=800, first_batches=0, long_lists=False)
    maker = RowMaker(config, tokenizer())
    assert [maker.share_of_tagged_rows(index) for index in (0, 199, 200, 300, 499, 599, 600, 9000)] == [
        0, 0, 0.1, 0.5, 0.5, 0.9, 1, 1
    ]  # fmt: skip
    rng = random.Random(6)
    for index, share in ((0, 0.0), (350, 0.5), (700, 1.0)):
        rows = [maker.text(rng, index) for _ in range(400)]
        tagged = ["<Parallel>" in text for _, text in rows]
        assert abs(np.mean(tagged) - share) < 0.1 and (0 < share < 1 or np.mean(tagged) == share)
        assert all(("in parallel" in prompt) is has_block for (prompt, _), has_block in zip(rows, tagged, strict=True))
        assert all(text.splitlines()[-1].startswith("Answer: ") for _, text in rows)
    assert RowMaker(RowConfig(kind="multiverse"), tokenizer()).share_of_tagged_rows(0) == 1


def official_mask(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Who sees whom [N, N] in the official code: siblings, from <Path> through </Path>, do not see each other."""
    tags = tokenizer().structure_vocab.tag_ids
    visible = np.tri(len(ids), dtype=np.bool_)
    blocks: list[list[list[int]]] = []
    for index, token in enumerate(ids):
        if token == tags[Tag.PARALLEL]:
            blocks.append([])
        elif token == tags[Tag.PATH]:
            blocks[-1].append([index])
        elif token == tags[Tag.END_PATH]:
            blocks[-1][-1].append(index + 1)
        elif token == tags[Tag.END_PARALLEL]:
            spans = blocks.pop()
            for one in spans:
                for other in spans:
                    if one is not other:
                        visible[slice(*one), slice(*other)] = False
    return visible


def test_two_labels_are_the_official_mask_with_its_leak() -> None:
    words = tokenizer()
    problems = [sample_satisfiability(random.Random(1), 4), sample_arithmetic(random.Random(1), 3)]
    samples, expected = [], []
    for problem in problems:
        ids = np.array(words.tokenize(problem.prompt + problem.response("tagged")))
        document = parse(ids.tolist(), words.structure_vocab, prompt_length=len(words.tokenize(problem.prompt)))
        samples.append(leaky(ids, document, lay_out(document)))
        expected.append(official_mask(ids))
        ours = lay_out(document).r
        leaks = expected[-1] & ~((ours[None] <= ours[:, None]) & np.tri(len(ids), dtype=np.bool_))
        gaps = [path.start for block in document.blocks for path in block.paths[1:]]
        assert leaks.any() and set(gaps) <= set(np.flatnonzero(leaks.any(axis=0) | leaks.any(axis=1)))
    length = sum(len(sample.ids) for sample in samples) + 3  # and padding
    want = torch.block_diag(*(torch.tensor(mask, dtype=torch.int) for mask in expected), torch.ones(3, 3).tril().int())
    layout = pack_layouts([*(sample.layout for sample in samples), padding_layout(3)])
    r = torch.from_numpy(both_labels(layout.r, list(samples)))[None]
    q, k, v = torch.randn(3, 1, 2, length, 16, generator=torch.Generator().manual_seed(0))
    with two_labels():
        found = multiverse_attention(q, k, v, AttentionLayout(r))
    torch.testing.assert_close(found, multiverse_attention_reference(q, k, v, want.bool()[None, None]))
    plain = torch.arange(length, dtype=torch.int32)[None]  # as before again, behind the with
    after = multiverse_attention(q, k, v, AttentionLayout(plain))
    torch.testing.assert_close(after, multiverse_attention_reference(q, k, v, visibility(plain)))


def test_a_run_under_the_official_mask_trains_with_two_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def train(config: Any, loader: Any) -> Any:
        used.append(BACKENDS["dense"])
        return SimpleNamespace(model_folder=None)  # stopped

    monkeypatch.setattr(one_run, "train", train)
    for name in ("multiverse-0", "official-mask"):
        options = one_run.OneRunOptions(name=name, output=tmp_path, smoke=True)
        with pytest.raises(SystemExit) as stop:
            one_run.train_one(options, SMOKE, runs()[name], tmp_path / "weights", tmp_path / "metrics.jsonl")
        assert stop.value.code == STOPPED
    assert used[0] is BACKENDS["dense"] is not used[1]


def test_rows_under_the_official_mask_have_both_labels_and_differ_in_nothing_else() -> None:
    ours, official = (RowMaker(RowConfig(kind="multiverse", official_mask=on), tokenizer()) for on in (False, True))
    rows, leaky_rows = ours.batch(900, 2, 4096), official.batch(900, 2, 4096)
    assert all(np.array_equal(rows[name], leaky_rows[name]) for name in rows if name != "r")
    as_query, as_key = leaky_rows["r"] >> 15, leaky_rows["r"] & 0x7FFF
    changed = (as_query != rows["r"]) | (as_key != rows["r"])
    newline = tokenizer().tokenize("\n")[0]
    assert 0 < changed.mean() < 0.05 and set(rows["input_ids"][changed]) == {newline}
    assert (as_query >= rows["r"]).all() and (as_key <= rows["r"]).all()


def test_gaps_keep_branches_side_by_side() -> None:
    positions = np.array([0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8])  # two paths from 4 on, and what follows at 7
    moved = gapped(positions, [2, 4, 7], random.Random(1))
    steps = {int(old): int(new) - int(old) for old, new in zip(positions, moved, strict=True)}
    assert all(steps[int(old)] == new - old for old, new in zip(positions, moved, strict=True))
    assert steps[0] == steps[1] == 0 < steps[2] == steps[3] < steps[4] == steps[6] < steps[7] == steps[8]
    for gaps in (True, False):
        rows = RowMaker(RowConfig(kind="plain", position_gaps=gaps), tokenizer()).batch(1, 2, 4096)
        assert bool((np.diff(rows["position_ids"]) > 1).any()) is gaps


@pytest.mark.parametrize("name", list(runs()))
def test_rows_are_reproducible_and_laid_out_for_their_kind(name: str) -> None:
    maker, index = RowMaker(runs()[name], tokenizer()), runs()[name].mixture_batches + 3
    batch, again = maker.batch(index, 4, 4096), maker.batch(index, 4, 4096)
    assert all(np.array_equal(batch[key], again[key]) for key in batch)
    assert batch["input_ids"].shape == (4, 4096) and (batch["input_ids"] == maker.tokenizer.pad).mean() < 0.15
    row = {key: array[0] for key, array in batch.items()}
    # Rows that are read one token after the other never go back; branches begin again after the goal.
    steps = np.diff(row["position_ids"])
    assert bool(((steps <= 0) & (row["position_ids"][1:] != 0)).any()) is (runs()[name].kind == "multiverse")
    assert 0.3 < row["loss_mask"].mean() < 0.95


def test_official_positions_are_those_of_the_official_code() -> None:
    text = "p<Parallel>\n<Goal>\n<Outline>\n1:</Outline>\n<Outline>\n2:</Outline>\n</Goal>\n"
    text += "<Path>\n1:aa</Path>\n<Path>\n2:</Path>\n<Conclusion>\nc</Conclusion>\n</Parallel>"
    ids, _, vocab = lex(text)
    document = parse(ids, vocab)
    goal, count = document.blocks[0].goal_end, len(ids)
    positions = official_positions(document)
    assert positions[:goal].tolist() == list(range(goal))
    first, second = document.blocks[0].paths
    # gap newline and <Path> share a position; the second gap counts on from the first </Path>
    assert (positions[first.start : first.end] - goal).tolist() == [0, 0, 1, 2, 3, 4]
    assert (positions[second.start : second.end] - goal).tolist() == [5, 0, 1, 2, 3]
    assert (positions[second.end :] - goal).tolist() == [4, *range(5, 5 + count - second.end - 1)]
    layout = lay_out(document)
    changed = with_positions(layout, positions)
    assert changed.position_ids.tolist() == positions.tolist() and changed.r.tolist() == layout.r.tolist()
    assert with_positions(layout, layout.position_ids).segments.tolist() == layout.segments.tolist()


def test_a_loader_goes_on_where_it_stood() -> None:
    maker = RowMaker(RowConfig(kind="multiverse"), tokenizer())
    loader, other = (MiniLoader(maker, seq_length=1024, micro_batch_size=1, num_workers=0) for _ in range(2))
    batches = iter(loader)
    next(batches)
    other.load_state_dict(loader.state_dict())
    assert np.array_equal(next(batches)["input_ids"], next(iter(other))["input_ids"])
    plain = MiniLoader(
        RowMaker(RowConfig(kind="plain"), tokenizer()), seq_length=1024, micro_batch_size=1, num_workers=0
    )
    with pytest.raises(CheckpointError, match="go on with the same"):
        plain.load_state_dict(loader.state_dict())


def fake_run(options: MiniatureOptions, name: str, device: int, devices: int) -> subprocess.Popen[bytes]:
    """A run that fails, is stopped or never ends, as its name says."""
    script = {"no-links": "exit 1", "fixed-labels": f"exit {STOPPED}", "forced-loss": "exec sleep 60"}[name]
    return subprocess.Popen(["sh", "-c", script])


def test_runs_that_fail_are_told_from_runs_that_were_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniature, "start_run", fake_run)
    with pytest.raises(TrainingError, match=r"1 runs failed.*no-links\.log"):
        train_all(MiniatureOptions(runs=["no-links"], output=tmp_path))
    assert train_all(MiniatureOptions(runs=["fixed-labels"], output=tmp_path)) is False
    assert train_all(MiniatureOptions(runs=["forced-loss"], output=tmp_path, minutes=0.01)) is False
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "no-links.json").write_text("{}")
    assert train_all(MiniatureOptions(runs=["no-links"], output=tmp_path)) is True
    with pytest.raises(ConfigError, match="known are multiverse-0"):
        train_all(MiniatureOptions(runs=["none"], output=tmp_path))


def test_what_is_timed_is_the_most_accurate_model_of_a_kind_that_is_there(tmp_path: Path) -> None:
    options = MiniatureOptions(output=tmp_path)
    (tmp_path / "results").mkdir()
    for name, right, has_weights in (
        ("plain-0", [0, 0], True),
        ("plain-1", [1, 0], True),
        ("plain-2", [1, 1], False),
        ("multiverse-0", [1, 1], False),
    ):
        sets = {"chains-4": {"right": right}, "variables-4": {"right": [1 - right[0]] * 9}}
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps({"sets": sets}))
        if has_weights:
            (tmp_path / "models" / name).mkdir(parents=True)
    assert most_accurate(options, "plain") == "plain-1"
    with pytest.raises(TrainingError, match="a model of kind multiverse: train multiverse-0 first"):
        most_accurate(options, "multiverse")


def test_the_time_of_missing_runs_is_told_from_those_that_are_done(tmp_path: Path) -> None:
    options = MiniatureOptions(output=tmp_path)
    (tmp_path / "results").mkdir()
    seconds = FULL.train_iters * FULL.rows * FULL.seq_length / FULL.tokens_per_s
    assert f"about {seconds:.0f} s each and evaluation, {2 * seconds:.0f} s in all" in estimate(options, ["a"] * 5, 4)
    (tmp_path / "results" / "plain-0.json").write_text('{"training_s": 90, "evaluation_s": 11}')
    (tmp_path / "results" / "plain-1.json").write_text('{"training_s": null, "evaluation_s": 11}')  # trained before
    assert "about 101 s each as those here took, 101 s in all" in estimate(options, ["a"] * 4, 4)


def test_the_fit_finds_its_own_formula() -> None:
    rows = [{"tokens": 100 * x, "critical": 100, "seconds": 0.1 * x * (3 / x + 0.5)} for x in (1, 2, 4)]
    assert fit_latency(rows) == pytest.approx((3.0, 0.5))
    assert fit_latency(rows[:1]) is None


def test_tables_and_figures_come_from_results(tmp_path: Path, whole_figures: list[str]) -> None:
    numbers = {"right": [1, 0], "tokens": [30, 40], "critical": [10, 20], "steps": [11, 21], "malformed": 0}
    sets = dict.fromkeys(("chains-4", "chains-8", "variables-4", "variables-5"), numbers)
    run = {"steps": 5, "parameters": 7, "tokens": 9, "loss": 0.5, "tokens_per_s": 99, "device": "CPU", "sets": sets}
    row = {"seconds": 0.2, "tokens": 30, "critical": 10, "right": 1, "chains": 4, "batch": 1}
    modes = {"parallel": [row], "one branch at a time": [row | {"seconds": 0.8}], "plain": [row | {"seconds": 0.5}]}
    contents = dict.fromkeys(("multiverse-0", "multiverse-1", "plain-0", "no-links"), run)
    for name, content in {**contents, "alone": {"modes": modes}, "batched": {"modes": modes}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    results = read_results(tmp_path)
    made = tables(results)
    assert "| 4 | 1 of 1 | 1 of 1 | 3.00 | 800 | 200 | 4.00 | 500 | 2.50 |" in made["alone"]
    assert "| 1 | 1 | 1 | 800 | 200 | 4.00 | 2.50 |" in made["batch"]
    assert made["time"].splitlines()[2:6] == [f"| {k}00 | 0 | 0 | {100 * (k > 1)} |" for k in (1, 2, 3, 4)]
    assert made["time"].splitlines()[6:] == [
        "| 500 | 100 | 0 | 100 |",
        "| 600 | 100 | 0 | 100 |",
        "| 700 | 100 | 0 | 100 |",
        "| 800 | 100 | 100 | 100 |",
    ]
    assert "x, batch 1: no fit, all are equally parallel (the paper's 32B: 15.430 / x + 0.600)." in made["fit"]
    assert "Not run yet: tagged-0, unlabelled-lists, fixed-labels, " in made["training"]
    assert "| 8 chains, more than trained | 50.0 | 50.0 ± 0.0 |" in made["accuracy"]
    assert (
        filled("a\n<!-- batch -->\nold\n<!-- end -->\nb", results)
        == f"a\n<!-- batch -->\n{made['batch']}\n<!-- end -->\nb"
    )
    wrong = results | {"alone": {"modes": modes | {"plain": [row | {"right": 0}]}}}
    assert "| 4 | 1 of 1 | 0 of 1 | 3.00 | 800 | 200 | 4.00 | - | - |" in tables(wrong)["alone"]
    draw(results, tmp_path)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("accuracy.png", "speed.png"))
    draw(read_results(MINIATURE / "results"), tmp_path / "committed")
    assert whole_figures == ["accuracy", "speed", "accuracy", "lengths", "speed"]


def test_the_readme_says_what_the_results_say() -> None:
    text = (MINIATURE / "README.md").read_text(encoding="utf-8")
    assert filled(text, read_results(MINIATURE / "results")) == text, "run examples/paper_in_miniature/paper_report.py"
