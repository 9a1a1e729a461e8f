"""Steps that wait for tokens which may fork or join a block: the same answers, and no step that ran for nothing."""

from __future__ import annotations

import random

import pytest

from megatron_multiverse.inference.scheduler import Scheduler
from megatron_multiverse.inference.step.runner import Runner
from megatron_multiverse.inference.text.commit import commit_token, foresee_fork
from megatron_multiverse.inference.text.state import RequestState, new_state
from megatron_multiverse.inference.turns import Turns
from megatron_multiverse.structure import StructureMachine, Tag
from tests.unit.inference import toy


def serve(scripts: list[toy.Script], *, overlap: bool, monkeypatch: pytest.MonkeyPatch, **settings: object):
    """(results, runs of the model) of one request for each script."""
    monkeypatch.setattr(toy, "OVERLAP", overlap)
    runs = []
    launch = Runner.launch
    monkeypatch.setattr(Runner, "launch", lambda *args: runs.append(args) or launch(*args))
    rng = random.Random(7)
    requests = [toy.ask(toy.random_prompt(rng), max_tokens=3000, sample=k) for k in range(len(scripts))]
    engine = toy.toy_engine(toy.ToyModel(1), sampler=toy.ScriptedSampler(scripts), **settings)
    results = engine.generate(requests)
    toy.assert_drained(engine)
    monkeypatch.setattr(Runner, "launch", launch)
    return results, len(runs)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_alone_a_request_takes_as_many_steps_as_in_turn(seed, page_size, monkeypatch):
    script = toy.tags_on_own_lines(toy.random_script(random.Random(seed), depth=2, blocks=2, most_paths=4))
    turn, overlapped = (
        serve([script], overlap=overlap, monkeypatch=monkeypatch, page_size=page_size) for overlap in (False, True)
    )
    assert [result.token_ids for result in overlapped[0]] == [result.token_ids for result in turn[0]]
    drawn = [[logprob for logprob in found[0][0].logprobs if logprob is not None] for found in (turn, overlapped)]
    assert drawn[0] == pytest.approx(drawn[1], abs=1e-9)
    assert turn[0][0].blocks and overlapped[1] == turn[1] + 1, "one step was launched before the end was known"


@pytest.mark.parametrize("max_rows", [5, 32])
@pytest.mark.parametrize("seed", range(4))
def test_answers_together_are_the_same(seed, max_rows, monkeypatch):
    rng = random.Random(100 + seed)
    scripts = [toy.tags_on_own_lines(toy.random_script(rng, depth=2, blocks=2)) for _ in range(5)]
    withdrawn = []
    withdraw = Scheduler.withdraw
    monkeypatch.setattr(Scheduler, "withdraw", lambda self, step: withdrawn.append(step) or withdraw(self, step))
    turn, overlapped = (
        serve(scripts, overlap=overlap, monkeypatch=monkeypatch, page_size=4, max_rows=max_rows)
        for overlap in (False, True)
    )
    assert [result.token_ids for result in overlapped[0]] == [result.token_ids for result in turn[0]]
    assert withdrawn


def test_a_line_ends_with_any_token_that_ends_in_a_newline():
    texts = {toy.TEXT: "end.\n", toy.TEXT + 1: "\nno"}
    turns = Turns(toy.VOCAB, lambda ids: "".join(texts.get(token, "x") for token in ids))
    assert [turns.ends_line(token) for token in (toy.NEWLINE, toy.TEXT, toy.TEXT + 1)] == [True, True, False]
    assert not Turns(toy.VOCAB, None).ends_line(toy.TEXT)


def test_a_fork_may_come_after_a_whole_outline_and_a_newline():
    machine = StructureMachine(toy.VOCAB)
    header = [Tag.PARALLEL, toy.NEWLINE, Tag.GOAL, toy.NEWLINE, Tag.OUTLINE, toy.NEWLINE, *toy.ids_of("1:")]
    found = []
    for token in [*header, toy.TEXT, Tag.END_OUTLINE, toy.NEWLINE, Tag.END_GOAL]:
        machine.push(int(token))
        found.append(machine.may_fork)
    assert found == [False] * (len(header) + 2) + [True, False]


@pytest.mark.parametrize("depth", [1, 2])
def test_what_is_foreseen_of_a_fork_is_what_it_begins_with(depth):
    """Foreseen at every line's end, and so too early as well, beside a fork that nobody foresaw."""

    def header(prefix: str, paths: int) -> list[int]:
        ids = [Tag.PARALLEL, toy.NEWLINE, Tag.GOAL]
        for path in range(paths):
            ids += [toy.NEWLINE, Tag.OUTLINE, toy.NEWLINE, *toy.ids_of(f"{prefix}{path + 1}:"), Tag.END_OUTLINE]
        return [int(token) for token in (*ids, toy.NEWLINE, Tag.END_GOAL)]

    def write(*, foresee: bool) -> RequestState:
        request = toy.ask([toy.TEXT] * 3, max_tokens=2000, sample=5)
        state = new_state(0, request, StructureMachine(toy.VOCAB), 4000)
        branch = state.root
        for level in range(depth):
            for token in header("" if level == 0 else "2.", 3):
                if foresee and branch.machine.may_fork:
                    foresee_fork(state, branch)
                commit_token(state, branch, token, -1.0)
            assert branch.foreseen is None
            branch = branch.blocks[-1].kids[1]
        return state

    plain, foreseen = write(foresee=False), write(foresee=True)
    for expected, branch in zip(plain.branches(), foreseen.branches(), strict=True):
        for name in (
            "name",
            "ids",
            "positions",
            "logprobs",
            "key",
            "path",
            "budget",
            "room",
            "outline",
            "next_position",
        ):
            assert getattr(branch, name) == getattr(expected, name), name
        machines = (
            {**vars(one.machine), "vocab": None, "_stack": repr(one.machine._stack)} for one in (branch, expected)
        )
        assert next(machines) == next(machines)
    assert sum(1 for _ in plain.branches()) == 1 + 3 * depth
