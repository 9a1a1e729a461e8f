"""The same answer whatever else runs, nothing leaks, budgets hold."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference import Engine, Result
from megatron_multiverse.inference.cache.tree import PageTree
from megatron_multiverse.structure import Tag

from .toy import (
    EOS,
    NEWLINE,
    TEXT,
    VOCAB,
    VOCAB_SIZE,
    ScriptedSampler,
    SoupSampler,
    ToyModel,
    ask,
    assert_drained,
    ids_of,
    largest_difference,
    random_prompt,
    random_script,
    structure_positions,
    toy_engine,
)

MODEL = ToyModel()


def goal(paths: int, labels: bool = True) -> list[int]:
    """The header of a block."""
    ids = [Tag.PARALLEL, NEWLINE, Tag.GOAL]
    for k in range(paths):
        label = ids_of(f"{k + 1}:") if labels else []
        ids += [NEWLINE, Tag.OUTLINE, NEWLINE, *label, TEXT + k % 10, Tag.END_OUTLINE]
    return [int(token) for token in [*ids, NEWLINE, Tag.END_GOAL]]


def tree_requests(seed: int, count: int = 3, **changes):
    scripts, requests = [], []
    for k in range(count):
        rng = random.Random(100 * seed + k)
        scripts.append(random_script(rng, depth=2, blocks=1, most_paths=3, text=9, free=True))
        requests.append(ask(random_prompt(rng, 30), max_tokens=900, sample=k, **changes))
    return scripts, requests


def answers(results):
    return [(r.token_ids, r.position_ids, r.finish_reason, r.critical_tokens, r.malformed) for r in results]


def run(seed, *, count=3, changes=None, **settings):
    scripts, requests = tree_requests(seed, count, **(changes or {}))
    engine = toy_engine(MODEL, sampler=ScriptedSampler(scripts), **settings)
    results = engine.generate(requests)
    assert_drained(engine)
    return results


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("seed", range(4))
def test_page_sizes_waves_and_rows_do_not_change_the_answer(seed):
    reference = run(seed)
    expected = answers(reference)
    assert any(result.blocks for result in reference)
    for page_size in (16, 64):
        assert answers(run(seed, page_size=page_size)) == expected
    sequential = run(seed, changes={"max_concurrent_branches": 1}, page_size=16)
    assert answers(sequential) == expected
    assert answers(run(seed, max_rows=2, page_size=16)) == expected
    assert answers(run(seed, max_rows=1, page_size=1)) == expected
    # One path after the other takes one step per sampled token; parallel only those of the longest chain.
    for one, many in zip(sequential, reference, strict=True):
        if many.num_parallel > 1.2:
            assert one.decode_steps > many.decode_steps
    alone = [run(seed, count=k + 1)[k] for k in range(3)]
    assert answers(alone) == expected


def test_forks_and_joins_cost_no_step():
    """Decode steps = sampled tokens on the longest chain, forced ones ride along."""
    script = {
        (): [TEXT, *goal(2), Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL, EOS],
        ((0, 0),): [TEXT] * 4 + [Tag.END_PATH],
        ((0, 1),): [TEXT] * 9 + [Tag.END_PATH],
    }
    engine = toy_engine(sampler=ScriptedSampler([script]), page_size=16)
    result = engine.generate([ask([TEXT] * 5)])[0]
    assert result.decode_steps == len(script[()]) + len(script[(0, 1),])
    assert result.critical_tokens == len(script[()]) - 1 + 5 + len(script[(0, 1),]) + 2
    assert len(result.token_ids) == result.critical_tokens + 5 + len(script[(0, 0),])
    assert result.num_parallel == len(result.token_ids) / result.critical_tokens
    assert engine.fed_tokens == 5 + len(result.token_ids) - 3, "what both paths begin with is computed once"
    names = [(span.branch, span.block) for span in result.timeline]
    assert names == [("", 0), ("1", 1), ("2", 1), ("", 0)]
    # Spans hold what branches wrote while they ran: all but the forced starts of paths and conclusion.
    assert sum(span.tokens for span in result.timeline) == len(result.token_ids) - 2 * 5 - 2
    assert max(span.end for span in result.timeline) == result.decode_steps
    block = result.blocks[0]
    assert [b.name for b in block.branches] == ["1", "2"]
    assert [b.outline for b in block.branches] == ["1:", "2:"]
    for branch in block.branches:
        assert result.token_ids[branch.start] == NEWLINE
        assert result.token_ids[branch.end - 1] == Tag.END_PATH
        assert branch.finish == "path_end"


def test_page_order_after_the_base_does_not_matter(monkeypatch):
    """A join may list the joined tokens in any order."""
    scripts, requests = tree_requests(11)
    join = PageTree.join

    def shuffled(self, parent, kids):
        before = parent.length
        assert join(self, parent, kids)
        # At page size 1 a page is a slot, so any order is a valid table.
        order = before + torch.randperm(parent.length - before).numpy()
        table = parent.pages[order]
        parent.pages[before:] = table
        # What the ledger notes of these slots stays true: a page is known by its number, not by its place.
        return True

    monkeypatch.setattr(PageTree, "join", shuffled)
    sampler = ScriptedSampler(scripts)
    engine = toy_engine(MODEL, sampler=sampler, page_size=1)
    results = engine.generate(requests)
    assert largest_difference(MODEL, sampler, requests, results) < 1e-9
    assert answers(results) == answers(run_plain(scripts, requests))


def run_plain(scripts, requests):
    return toy_engine(MODEL, sampler=ScriptedSampler(scripts)).generate(requests)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("page_size", [1, 16])
def test_cancel_at_every_step_leaves_the_others_alone(page_size):
    scripts, requests = tree_requests(7)
    settings = {"page_size": page_size, "max_rows": 6}
    expected = answers(toy_engine(MODEL, sampler=ScriptedSampler(scripts), **settings).generate(requests))
    steps = 0
    while True:
        engine = toy_engine(MODEL, sampler=ScriptedSampler(scripts), **settings)
        for request in requests:
            engine.add_request(request)
        results = {}
        for _ in range(steps):
            results.update((r.request_id, r) for r in engine.step())
        if 1 in results:
            break
        engine.cancel(1)
        while engine.has_work:
            results.update((r.request_id, r) for r in engine.step())
        assert results[1].finish_reason == "abort"
        assert_balanced(results[1])
        assert results[1].position_ids == structure_positions(requests[1].prompt_ids, results[1])
        assert [answers([results[k]])[0] for k in (0, 2)] == [expected[0], expected[2]]
        assert_drained(engine)
        steps += 3
    assert steps > 6


def assert_balanced(result):
    from megatron_multiverse.structure import parse

    document = parse(result.token_ids, VOCAB, strict=False)
    assert document.malformed["unclosed"] == 0


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("seed", range(3))
def test_a_small_cache_preempts_and_replays_the_same_answer(seed, page_size):
    """Requests that do not fit together step back and go on later, token for token the same."""
    scripts, requests = tree_requests(seed, 10)
    expected = answers(run(seed, count=10, page_size=page_size))
    heard: dict[tuple[int, str], list[int]] = {}
    engine = toy_engine(
        MODEL, sampler=ScriptedSampler(scripts), page_size=page_size, num_pages=-(-932 // page_size), max_rows=64
    )
    results = engine.generate(requests, on_token=lambda r, b, ids: heard.setdefault((r, b), []).extend(ids))
    assert answers(results) == expected
    assert_drained(engine)
    assert sum(result.preemptions for result in results) > 0
    for k, result in enumerate(results):
        assert sum(len(ids) for (r, _), ids in heard.items() if r == k) == len(result.token_ids)


def test_preemption_happens_and_keeps_sampled_tokens():
    """Two plain requests of 60 tokens each in a cache of 80."""
    requests = [ask([TEXT + k] * 5, max_tokens=60, temperature=1.0, seed=k, ignore_eos=True) for k in range(2)]
    free = toy_engine(MODEL, page_size=4, num_pages=200)
    expected = free.generate(requests)
    tight = toy_engine(MODEL, page_size=4, num_pages=20)
    results = tight.generate(requests)
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    assert sum(r.preemptions for r in results) >= 1
    assert_drained(tight)


def test_the_last_tree_that_does_not_fit_ends_with_length():
    """Six ragged branches of page size 64 need more pages than there are."""
    script = {(): [*goal(6), *[TEXT] * 100], **{((0, k),): [TEXT] * 500 for k in range(6)}}
    engine = toy_engine(sampler=ScriptedSampler([script]), page_size=64, num_pages=4)
    result = engine.generate([ask([TEXT] * 5, max_tokens=240)])[0]
    assert result.finish_reason == "length"
    assert "4 pages of 64 tokens" in result.error
    assert result.malformed["out_of_pages"] == 1
    assert len(result.token_ids) <= 240
    assert_balanced(result)
    assert_drained(engine)


def test_a_fork_that_does_not_fit_at_once_runs_in_waves_when_nothing_else_can():
    script = {(): [*goal(6), *[TEXT] * 5, EOS], **{((0, k),): [TEXT] * 3 + [Tag.END_PATH] for k in range(6)}}
    wide = toy_engine(sampler=ScriptedSampler([script]), page_size=16, num_pages=100)
    request = ask([TEXT] * 5, max_tokens=150)
    expected = wide.generate([request])[0]
    tight = toy_engine(sampler=ScriptedSampler([script]), page_size=16, num_pages=11)
    result = tight.generate([request])[0]
    assert result.token_ids == expected.token_ids
    assert result.position_ids == expected.position_ids
    assert_drained(tight)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 10, 25, 40, 55, 70, 100, 200])
@pytest.mark.parametrize("critical", [None, 30])
def test_budgets_hold_and_plain_text_uses_them_up(max_tokens, critical):
    """Neither the tokens of all branches nor the longest chain exceed what was asked for."""
    request = ask([TEXT], max_tokens=max_tokens, max_critical_tokens=critical)
    plain = {(): [TEXT] * 300}
    result = toy_engine(sampler=ScriptedSampler([plain])).generate([request])[0]
    assert len(result.token_ids) == min(max_tokens, critical or max_tokens)
    assert result.finish_reason == "length"
    script = {(): [TEXT, *goal(3), *[TEXT] * 300], **{((0, k),): [TEXT] * 300 for k in range(3)}}
    engine = toy_engine(sampler=ScriptedSampler([script]), page_size=16)
    result = engine.generate([request])[0]
    assert len(result.token_ids) <= max_tokens
    assert result.critical_tokens <= (critical or max_tokens)
    assert result.critical_tokens == max(result.position_ids)
    assert result.finish_reason == "length"
    assert sum(b.end - b.start for block in result.blocks for b in block.branches) <= len(result.token_ids)
    assert_balanced(result)
    assert_drained(engine)


@pytest.mark.usefixtures("overlap")
def test_a_capped_branch_is_closed_and_flagged_and_the_answer_goes_on():
    script = {
        (): [*goal(2), TEXT, Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL, TEXT, EOS],
        ((0, 0),): [TEXT] * 300,
        ((0, 1),): [TEXT, Tag.END_PATH],
    }
    result = toy_engine(sampler=ScriptedSampler([script])).generate([ask([TEXT], max_tokens=120)])[0]
    assert result.finish_reason == "stop"
    assert [b.finish for b in result.blocks[0].branches] == ["length", "path_end"]
    assert result.malformed["forced_close"] == 1
    assert_balanced(result)


@pytest.mark.usefixtures("overlap")
def test_a_path_is_closed_at_its_own_limit_and_its_inner_paths_at_theirs():
    outline = [Tag.OUTLINE, NEWLINE, *ids_of("2.1:"), TEXT, Tag.END_OUTLINE]
    script = {
        (): [*goal(3), TEXT, Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL, EOS],
        ((0, 0),): [TEXT] * 300,
        ((0, 1),): [Tag.PARALLEL, NEWLINE, Tag.GOAL, NEWLINE, *outline, NEWLINE, Tag.END_GOAL, *[TEXT] * 300],
        ((0, 1), (0, 0)): [TEXT] * 300,
        ((0, 2),): [*[TEXT] * 27, NEWLINE, Tag.END_PATH],
    }
    script = {path: [int(token) for token in ids] for path, ids in script.items()}
    result = toy_engine(sampler=ScriptedSampler([script])).generate([ask([TEXT], branch_max_tokens=30)])[0]
    assert result.finish_reason == "stop"
    first, second, third = result.blocks[0].branches
    (inner,) = result.blocks[1].branches
    assert [path.finish for path in (first, second, inner, third)] == ["length", "length", "length", "path_end"]
    label, inner_label = 3 + len(ids_of("1:")), 3 + len(ids_of("2.1:"))
    assert [path.end - path.start for path in (first, inner, third)] == [label + 30, inner_label + 30, label + 29]
    assert second.end - second.start - (inner.end - inner.start) == label + 30
    assert_balanced(result)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("most", [1, 2, 3, 4, 20, 60])
def test_an_answer_that_may_stay_open_has_as_many_tokens_as_it_was_given(most: int) -> None:
    """As other engines give them: nothing is kept for closing tags, and none are written, however it ends."""
    script = {(): [int(Tag.THINK), NEWLINE, *goal(2), *range(TEXT, TEXT + 20), EOS]}
    drawn = script[()][:-1]

    def serve(**sampling: object) -> Result:
        engine = toy_engine(MODEL, sampler=ScriptedSampler([script]))
        asked = ask([TEXT], max_tokens=most, max_depth=0, leave_open=True, **sampling)
        (result,) = engine.generate([asked])
        assert_drained(engine)
        return result

    result = serve()
    assert result.token_ids == drawn[:most] and all(result.sampled)
    assert result.finish_reason == ("length" if most < len(drawn) else "stop")
    assert "forced_close" not in result.malformed
    short = serve(max_critical_tokens=max(1, most - 1))
    assert short.token_ids == drawn[: max(1, most - 1)]
    if most > 4:
        by_token = serve(stop_token_ids=(drawn[4],))
        assert by_token.token_ids == drawn[:4] and by_token.finish_reason == "stop"


def test_what_is_left_open_never_forks() -> None:
    for depth in (None, 1):
        with pytest.raises(GenerationError, match="leave_open is for answers that never fork"):
            SamplingParams(leave_open=True, max_depth=depth)
    with pytest.raises(GenerationError, match="leave out leave_open, or on_malformed"):
        SamplingParams(leave_open=True, max_depth=0, on_malformed="error")


def test_end_of_text_in_a_path_ends_that_path_only():
    script = {
        (): [*goal(2), Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL, TEXT, EOS],
        ((0, 0),): [TEXT, EOS],
        ((0, 1),): [TEXT, TEXT, Tag.END_PATH],
    }
    result = toy_engine(sampler=ScriptedSampler([script])).generate([ask([TEXT])])[0]
    assert result.finish_reason == "stop"
    assert [b.finish for b in result.blocks[0].branches] == ["eos", "path_end"]
    assert EOS not in result.token_ids
    assert_balanced(result)


@pytest.mark.usefixtures("overlap")
def test_stop_ids_end_the_root_but_not_a_path():
    script = {
        (): [*goal(1), TEXT + 5, TEXT],
        ((0, 0),): [TEXT + 5, Tag.END_PATH],
    }
    request = ask([TEXT], stop_token_ids=(TEXT + 5,))
    result = toy_engine(sampler=ScriptedSampler([script])).generate([request])[0]
    assert result.finish_reason == "stop"
    assert result.token_ids.count(TEXT + 5) == 1
    assert result.token_ids[-5:] == [Tag.CONCLUSION, NEWLINE, Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL]


@pytest.mark.parametrize(
    ("root", "code"),
    [
        ([Tag.PARALLEL, NEWLINE, Tag.GOAL, NEWLINE, Tag.END_GOAL, TEXT], "no_outline"),
        (goal(2, labels=False), "unlabelled_outline"),
        (goal(5), "too_many_paths"),
        ([Tag.END_PATH, TEXT], "stray_tag"),
        ([Tag.PATH, NEWLINE, TEXT], "stray_tag"),
        ([Tag.END_PARALLEL], "stray_tag"),
        ([Tag.PARALLEL, NEWLINE, Tag.PARALLEL, TEXT], "broken_header"),
    ],
)
def test_malformed_output_goes_on_as_plain_text_and_is_counted(root, code):
    script = {(): [*map(int, root), TEXT, TEXT, EOS]}
    engine = toy_engine(sampler=ScriptedSampler([script]), max_paths=4)
    result = engine.generate([ask([TEXT])])[0]
    assert result.finish_reason == "stop"
    assert result.blocks == []
    assert result.token_ids[: len(root) + 2] == [*root, TEXT, TEXT]
    assert result.position_ids == list(range(1, 1 + len(result.token_ids)))
    assert result.malformed[code] >= 1


@pytest.mark.parametrize(("of_engine", "of_request"), [(1, None), (5, 1), (1, 5), (None, 1)])
def test_blocks_deeper_than_allowed_stay_serial(of_engine, of_request):
    script = {
        (): [*goal(1), EOS],
        ((0, 0),): [*goal(1), Tag.END_PATH],
    }
    engine = toy_engine(sampler=ScriptedSampler([script]), max_depth=of_engine)
    result = engine.generate([ask([TEXT], max_depth=of_request)])[0]
    assert result.malformed["too_deep"] == 1
    assert len(result.blocks) == 1


@pytest.mark.parametrize(("of_engine", "of_request"), [(2, None), (64, 2), (2, 64), (None, 2)])
def test_goals_with_more_outlines_than_allowed_stay_serial(of_engine, of_request):
    script = {(): [*goal(3), TEXT, EOS]}
    engine = toy_engine(sampler=ScriptedSampler([script]), max_paths=of_engine)
    result = engine.generate([ask([TEXT], max_paths=of_request)])[0]
    assert result.blocks == [] and result.token_ids[-1] == TEXT


def test_tags_in_the_prompt_are_inert():
    """A header in the prompt does not fork when the answer closes the goal."""
    prompt = goal(2)[:-1]
    script = {(): [Tag.END_GOAL, TEXT, EOS]}
    result = toy_engine(sampler=ScriptedSampler([script])).generate([ask(prompt)])[0]
    assert result.blocks == []
    assert result.malformed == {"stray_tag": 1}


def test_the_same_prompt_is_answered_the_same_before_and_after_other_traffic():
    """Text that equals that of a finished branch is computed afresh, causally."""
    scripts, requests = tree_requests(3, count=1)
    engine = toy_engine(MODEL, sampler=ScriptedSampler(scripts * 3), page_size=16)
    first = engine.generate(requests)[0]
    branch_text = first.token_ids[: len(first.token_ids) // 2]
    plain = ask([*requests[0].prompt_ids, *branch_text], max_tokens=8, ignore_eos=True)
    fresh = Engine(MODEL, VOCAB, EngineConfig(num_pages=200))
    expected = fresh.generate([plain])[0].token_ids
    engine.runner.sampler = fresh.runner.sampler
    assert engine.generate([plain])[0].token_ids == expected
    assert engine.generate([plain])[0].token_ids == expected
    assert_drained(engine)


def test_seeded_sampling_does_not_depend_on_the_batch():
    requests = [
        ask([TEXT + k], max_tokens=25, temperature=0.9, top_k=k * 5, top_p=1 - 0.2 * (k % 2), seed=k // 2)
        for k in range(6)
    ]
    together = toy_engine(MODEL).generate(requests)
    few = toy_engine(MODEL, max_rows=2, page_size=16).generate(requests)
    alone = [toy_engine(MODEL).generate([request])[0] for request in requests]
    ids = [r.token_ids for r in together]
    assert ids == [r.token_ids for r in few] == [r.token_ids for r in alone]
    assert len({tuple(x) for x in ids}) > 3


def test_padding_of_the_output_layer_is_never_chosen():
    request = ask([TEXT], max_tokens=40, temperature=5.0, ignore_eos=True)
    few = toy_engine(MODEL, vocab_size=30).generate([request])[0]
    assert max(few.token_ids) < 30
    assert max(toy_engine(MODEL).generate([request])[0].token_ids) >= 30


def test_requests_that_can_never_fit_are_refused_with_the_numbers():
    engine = toy_engine(num_pages=4, page_size=16)
    with pytest.raises(
        GenerationError, match=r"prompt \(10 tokens\) and max_tokens \(55\) need 65 .* 64 \(4 pages of 16\)"
    ):
        engine.generate([ask([TEXT] * 10, max_tokens=55)])
    assert not engine.has_work
    small = toy_engine(max_position=8)
    with pytest.raises(GenerationError, match=r"prompt \(8 tokens\) leaves no room in the 8 positions"):
        small.add_request(ask([TEXT] * 8, max_tokens=5))
    for prompt, advice in {63: "lower max_tokens", 64: "shorten the prompt"}.items():
        with pytest.raises(GenerationError, match=rf"{advice} or raise num_pages"):
            engine.add_request(ask([TEXT] * prompt, max_tokens=2))
    with pytest.raises(GenerationError, match="8 positions of the model; shorten the prompt"):  # pages would not help
        small.add_request(ask([TEXT] * 10**6, max_tokens=5))
    result = small.generate([ask([TEXT] * 5, max_tokens=50, ignore_eos=True)])[0]
    assert len(result.token_ids) == 3
    assert result.finish_reason == "length"


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 0},
        {"max_critical_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"max_concurrent_branches": 0},
    ],
)
def test_bad_requests_are_refused(changes):
    with pytest.raises(GenerationError, match=next(iter(changes))):
        SamplingParams(**changes)
    with pytest.raises(GenerationError, match="prompt_ids is empty"):
        ask([])


@pytest.mark.parametrize("changes", [{"max_rows": 0}, {"max_step_tokens": 0}])
def test_bad_engine_sizes_are_refused(changes):
    with pytest.raises(GenerationError, match=next(iter(changes))):
        toy_engine(**changes)


def test_logits_that_are_not_finite_end_the_request_with_an_error():
    class Broken(ToyModel):
        def forward(self, *args, **kwargs):
            logits = super().forward(*args, **kwargs)
            return logits * float("nan") if self.broken else logits

    script = {(): [*goal(2), EOS], ((0, 0),): [TEXT] * 20, ((0, 1),): [TEXT] * 20}
    model = Broken()
    model.broken = False
    engine = toy_engine(model, sampler=ScriptedSampler([script]))
    engine.add_request(ask([TEXT]))
    for _ in range(len(goal(2)) + 4):
        assert engine.step() == []
    model.broken = True
    result = engine.step()[0]
    assert result.finish_reason == "error"
    assert "not finite" in result.error
    assert_balanced(result)
    assert_drained(engine)


def test_cancelling_from_a_callback_and_unknown_ids():
    engine = toy_engine(MODEL, sampler=SoupSampler(1))
    engine.cancel(99)
    seen = []

    def listen(request_id, branch, ids):
        seen.extend(ids)
        if len(seen) > 10:
            engine.cancel(request_id)

    engine.add_request(ask([TEXT], max_tokens=500, ignore_eos=True), on_token=listen)
    results = []
    while engine.has_work:
        results += engine.step()
    assert results[0].finish_reason == "abort"
    assert len(results[0].token_ids) < 60
    assert_drained(engine)


def test_a_cancelled_request_that_never_started_is_returned():
    engine = toy_engine(MODEL, max_rows=1)
    engine.add_request(ask([TEXT], max_tokens=5, ignore_eos=True))
    second = engine.add_request(ask([TEXT], max_tokens=5, ignore_eos=True))
    engine.step()
    engine.cancel(second)
    result = engine.step()[0]
    assert (result.request_id, result.finish_reason, result.token_ids) == (second, "abort", [])
    assert result.num_parallel == 1.0


def test_the_hook_leaves_a_model_as_it_was():
    from megatron_multiverse.config import ModelConfig
    from megatron_multiverse.model.attention import LayoutParams
    from megatron_multiverse.model.gpt import build_gpt_model

    config = ModelConfig(
        num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=1, kv_channels=8,
        vocab_size=VOCAB_SIZE, max_sequence_length=64,
    )  # fmt: skip
    model = build_gpt_model(config)
    engine = Engine(model, VOCAB, EngineConfig(num_pages=10))
    assert engine.max_position == 64
    engine.generate([ask([TEXT, TEXT], max_tokens=3)])
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        logits = model(ids, torch.arange(3)[None], None, packed_seq_params=LayoutParams.causal(ids))
    assert logits.shape == (1, 3, VOCAB_SIZE)
    engine.runner.close()
    engine.runner.close()
