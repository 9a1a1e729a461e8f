"""The five stages against scripted answers, right and wrong."""

from __future__ import annotations

import json

import pytest

from megatron_multiverse.curation.exchange import Answer, Failure, Request, Usage
from megatron_multiverse.curation.pipeline import Passed, SetAside
from megatron_multiverse.curation.questions import MAX_OUTPUT_TOKENS
from megatron_multiverse.curation.rules import Rules
from megatron_multiverse.curation.token_counts import RoughTokens
from megatron_multiverse.curation.trees import plain_text, walk
from megatron_multiverse.structure import Block, Parts
from tests.unit.curation.drive import Reply, drive
from tests.unit.curation.random_trees import trajectory
from tests.unit.curation.scripted import Script

KEEP_ALL = Rules(RoughTokens(), min_net_gain=0)
LONG = "word " * 300
TWO = Block(("first", "second"), ((f"{LONG}one",), (f"{LONG}two",)), "one and two")
PARTS: Parts = ("Begin.", TWO, "Middle.", Block(("third", "fourth"), (("Three.",), ("Four.",)), "3 and 4"), "End.")


@pytest.mark.parametrize("seed", range(25))
def test_right_answers_give_the_trajectory_back(seed: int) -> None:
    script = Script(trajectory(seed))
    outcome, asked = drive(script, KEEP_ALL)
    assert isinstance(outcome, Passed) and outcome.parts == script.parts
    assert [request.stage for request in asked] == ["outline", "groups", "rewrite"]
    assert outcome.details["distance"] == 0
    assert len({request.shared for request in asked}) == 1
    assert asked[0].schema == asked[1].schema and asked[0].is_cached and asked[1].is_cached
    assert not asked[2].is_cached, "without a schema no other request shares its cache"


def once(stage: str, wrong: Answer | Failure | str | None = None, change: tuple[str, str] = ("", "")) -> Reply:
    """Wrong at the first question of a stage, right from then on."""

    def reply(request: Request, answer: str) -> Answer | Failure | str:
        if request.stage != stage or request.attempt > 1:
            return answer
        return answer.replace(*change, 1) if wrong is None else wrong

    return reply


@pytest.mark.parametrize(
    ("stage", "change", "reason"),
    [
        ("outline", ('"first_line": 1,', '"first_line": 2,'), "step 1 must begin with line 1, not with 2"),
        ("outline", ('"title"', '"name"'), "the field 'title' is missing"),
        ("outline", ("{", "["), "the answer is not JSON"),
        ("outline", ('"Plain text"', '""'), "a step has an empty title"),
        ("groups", ('"step": "2"', '"step": "9"'), "names '9', which is no step of the outline"),
        ("groups", ('"step": "2"', '"step": "1"'), "no run of neighbouring steps"),
        ("groups", ('"needs": []', '"needs": ["3"]'), "2 needs 3, no earlier member of the group"),
        ("groups", ('"subtask"', '"sum"'), "kind 'sum' is none of"),
        ("rewrite", ("</Conclusion>", ""), 'one and two": found </Parallel>, expected </Conclusion>'),
        ("rewrite", ("</Parallel>", ""), "complete outermost blocks instead of 2"),
        ("rewrite", ("2: second", "3: second"), "found label 3:, expected label 2:"),
        ("rewrite", ("one and two", ""), "a conclusion is empty"),
        ("rewrite", ("2: word", "2: Next, word"), 'path 2 begins with "Next"'),
        ("rewrite", (LONG, "short "), "its paths differ too much from the original wording"),
    ],
)
def test_a_wrong_answer_is_asked_again_with_the_reason(stage: str, change: tuple[str, str], reason: str) -> None:
    script = Script(PARTS)
    outcome, asked = drive(script, KEEP_ALL, once(stage, change=change))
    assert isinstance(outcome, Passed) and outcome.parts == PARTS
    of_stage = [request for request in asked if request.stage == stage]
    assert len(of_stage) == 2 and len(asked) == 4
    assert reason in of_stage[1].task and reason not in of_stage[0].task
    assert "attempt 2" in of_stage[1].task
    assert [entry.get("problem", "") != "" for entry in outcome.details["history"]].count(True) == 1


def test_only_the_blocks_that_failed_are_asked_again() -> None:
    script = Script(PARTS)
    outcome, asked = drive(script, KEEP_ALL, once("rewrite", change=("2: word", "2: Next, word")))
    assert isinstance(outcome, Passed) and outcome.parts == PARTS
    assert "Block 2" in asked[-2].task and "Block 2" not in asked[-1].task


def test_a_lost_final_answer_is_noticed() -> None:
    parts: Parts = ("Begin.", Block(("a", "b"), (("x.",), (f"{LONG}\nIt is \\boxed{{42}}.",)), "c"))
    outcome, asked = drive(Script(parts), KEEP_ALL, once("rewrite", change=("boxed{42}", "boxed{41}")))
    assert isinstance(outcome, Passed) and outcome.parts == parts
    assert "the final answer 42 of the text got lost" in asked[-1].task


def always(stage: str, change: tuple[str, str]) -> Reply:
    return lambda request, answer: answer.replace(*change, 1) if request.stage == stage else answer


@pytest.mark.parametrize(
    ("stage", "change", "questions"),
    [("outline", ("{", "["), 3), ("groups", ("{", "["), 4), ("rewrite", ("one and two", ""), 5)],
)
def test_after_the_last_attempt_the_sample_is_set_aside(stage: str, change: tuple[str, str], questions: int) -> None:
    outcome, asked = drive(Script(PARTS), KEEP_ALL, always(stage, change))
    assert isinstance(outcome, SetAside) and outcome.code == stage
    assert len(asked) == questions == len(outcome.history)
    assert all("problem" in entry for entry in outcome.history[-3:])


def test_blocks_that_cannot_be_rewritten_may_become_text() -> None:
    rules = Rules(RoughTokens(), min_net_gain=0, failed_blocks="flatten")
    outcome, _ = drive(Script(PARTS), rules, always("rewrite", ("one and two", "")))
    assert isinstance(outcome, Passed)
    assert [block.conclusion for _, block in walk(outcome.parts)] == ["3 and 4"]
    assert plain_text(outcome.parts) == plain_text(PARTS)
    assert outcome.details["flattened"]["not rewritten"] == 1


def test_paths_that_stay_dependent_lead_back_to_the_groups_once() -> None:
    def reply(request: Request, answer: str) -> str:
        if request.stage == "rewrite":
            return answer.replace("2: word", "2: Next, word")
        if request.stage == "groups" and "could not be made independent" in request.task:
            return json.dumps({"steps": [], "groups": json.loads(answer)["groups"][1:]})
        return answer

    outcome, asked = drive(Script(PARTS), KEEP_ALL, reply)
    assert isinstance(outcome, Passed)
    assert [request.stage for request in asked] == ["outline", "groups", *["rewrite"] * 3, "groups"]
    assert [block.conclusion for _, block in walk(outcome.parts)] == ["3 and 4"], "what was accepted is not asked again"
    outcome, asked = drive(Script(PARTS), KEEP_ALL, always("rewrite", ("2: word", "2: Next, word")))
    assert isinstance(outcome, SetAside) and outcome.code == "independence"
    assert [request.stage for request in asked].count("groups") == 2


def test_the_judge_sends_blocks_back_and_signs_can_be_reported() -> None:
    verdict = {"verdicts": [{"block": 1, "path": "2", "is_independent": False, "reason": "uses x"}]}
    rules = Rules(RoughTokens(), min_net_gain=0, independence="judge")
    outcome, asked = drive(Script(PARTS), rules, once("judge", json.dumps(verdict)))
    assert isinstance(outcome, Passed)
    assert [request.stage for request in asked[2:]] == ["rewrite", "judge", "rewrite", "judge"]
    assert "path 2: uses x" in asked[4].task
    rules = Rules(RoughTokens(), min_net_gain=0, independence="report")
    outcome, asked = drive(Script(PARTS), rules, always("rewrite", ("2: word", "2: Next, word")))
    assert isinstance(outcome, Passed) and len(asked) == 3
    assert outcome.details["signs_of_dependence"] == ['path 2 begins with "Next", which leads over from another path']


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (Answer("", "refusal", "m", Usage(), refusal="reasoning_extraction: no"), "refusal"),
        (Answer("", "context_window", "m", Usage()), "context_window"),
        (Failure("overloaded"), "provider"),
    ],
)
@pytest.mark.parametrize("stage", ["outline", "groups", "rewrite"])
def test_what_asking_again_cannot_mend_ends_at_once(wrong: Answer | Failure, code: str, stage: str) -> None:
    outcome, asked = drive(Script(PARTS), KEEP_ALL, once(stage, wrong))
    assert isinstance(outcome, SetAside) and outcome.code == code
    assert [request.stage for request in asked].count(stage) == 1
    assert outcome.history[-1]["stage"] == stage and code in outcome.history[-1]["problem"]


def test_an_answer_that_was_cut_off_gets_more_room() -> None:
    cut = Answer("{", "max_tokens", "m", Usage())
    outcome, asked = drive(Script(PARTS), KEEP_ALL, once("outline", cut))
    assert isinstance(outcome, Passed)
    assert asked[1].max_tokens == 2 * asked[0].max_tokens <= MAX_OUTPUT_TOKENS


@pytest.mark.parametrize("text", ["", " \n", "a <Path> in the text"])
def test_chains_that_cannot_be_used_cost_nothing(text: str) -> None:
    script = Script(("x",))
    script.text = text
    outcome, asked = drive(script, KEEP_ALL)
    assert isinstance(outcome, SetAside) and outcome.code == "input" and not asked


def test_blocks_without_hope_are_not_paid_for() -> None:
    outcome, asked = drive(Script(PARTS), Rules(RoughTokens()))
    assert isinstance(outcome, Passed)
    assert asked[-1].task.count("<Parallel>") == 1
    assert [block.conclusion for _, block in walk(outcome.parts)] == ["one and two"]
    assert outcome.details["flattened"]["too short"] == 1
    assert plain_text(outcome.parts) == plain_text(PARTS)


def test_blocks_that_do_not_pay_are_flattened_or_sent_back_for_shorter_conclusions() -> None:
    half = "word " * 40
    wordy = Block(("first", "second"), ((half,), (half,)), "blah " * 80)
    parts: Parts = ("Begin.", wordy, "End.")
    outcome, asked = drive(Script(parts), Rules(RoughTokens()))
    assert isinstance(outcome, Passed) and not list(walk(outcome.parts)) and len(asked) == 3
    assert outcome.details["flattened"]["no net gain"] == 1
    assert outcome.parts == (Script(parts).text,), "the original lines again"

    def shorter(request: Request, answer: str) -> str:
        return answer.replace("blah " * 80, "done.") if "too long for what the block saves" in request.task else answer

    rules = Rules(RoughTokens(), losing_blocks="shorten")
    outcome, asked = drive(Script(parts), rules, shorter)
    assert isinstance(outcome, Passed) and len(asked) == 4
    assert [block.conclusion for _, block in walk(outcome.parts)] == ["done."]
    outcome, asked = drive(Script(parts), rules)  # it does not get shorter
    assert isinstance(outcome, Passed) and not list(walk(outcome.parts)) and len(asked) == 5


def test_steps_that_wait_for_one_another_are_put_into_two_blocks() -> None:
    paths = tuple((f"{LONG}{k}",) for k in range(4))
    parts: Parts = ("Begin.", Block(("a", "b", "c", "d"), paths, "e"), "End.")

    def reply(request: Request, answer: str) -> str:
        if request.stage == "groups":
            groups = json.loads(answer)
            groups["groups"][0]["members"][2]["needs"] = ["2"]
            groups["groups"][0]["members"][3]["needs"] = ["2", "3"]
            return json.dumps(groups)
        return answer

    outcome, _ = drive(_EchoingScript(parts), KEEP_ALL, reply)
    assert isinstance(outcome, Passed)
    assert [block.outlines for _, block in walk(outcome.parts)] == [("a", "b"), ("c", "d")]
    assert outcome.details["groups"] == {"split": 1}
    assert plain_text(outcome.parts) == plain_text(parts)


class _EchoingScript(Script):
    """Gives blocks back as they were asked for, with a conclusion."""

    def answer(self, stage: str, task: str) -> str:
        if stage != "rewrite":
            return super().answer(stage, task)
        drafts = task.partition("<blocks>")[2].partition("</blocks>")[0]
        return drafts.replace("<Conclusion>\n\n", "<Conclusion>\nc\n")
