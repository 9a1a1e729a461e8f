"""Whatever comes out of the model, a request ends, closed, within budget, without a leak."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_multiverse.inference import Request
from megatron_multiverse.structure import Tag, parse

from .test_engine import goal
from .toy import (
    EOS,
    TEXT,
    VOCAB,
    NullModel,
    ScriptedSampler,
    SoupSampler,
    ask,
    assert_drained,
    changed,
    ids_of,
    jumping_clock,
    structure_positions,
    toy_engine,
)

MODEL = NullModel()
END_PATH = int(Tag.END_PATH)

pytestmark = pytest.mark.usefixtures("overlap")


def check_paths(request: Request, result) -> None:
    """No path wrote more than it may; one that a limit ended has hardly a token left."""
    limit = request.sampling.branch_max_tokens
    if limit is None:
        return
    paths = [branch for block in result.blocks for branch in block.branches]
    for path in paths:
        inner = sum(kid.end - kid.start for kid in paths if kid.path[:-1] == path.path)
        assert path.end - path.start - inner <= 3 + len(ids_of(path.outline)) + limit


def check(request: Request, result, *, exact: bool) -> None:
    check_paths(request, result)
    assert len(result.token_ids) <= request.sampling.max_tokens
    assert result.critical_tokens <= (request.sampling.max_critical_tokens or request.sampling.max_tokens)
    assert len(result.token_ids) == len(result.position_ids)
    prompt = len(request.prompt_ids)
    if result.position_ids:
        assert max(result.position_ids) == prompt + result.critical_tokens - 1
        assert result.position_ids[0] == prompt
    if exact:
        # The engine's own positions are those that training gives the same tokens.
        assert result.position_ids == structure_positions(request.prompt_ids, result)
        document = parse(result.token_ids, VOCAB, strict=False)
        assert document.malformed["unclosed"] == 0
        assert sum(1 for _ in document.walk()) == len(result.blocks)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    max_tokens=st.integers(1, 260),
    critical=st.none() | st.integers(1, 120),
    own=st.none() | st.integers(2, 40),
    page_size=st.sampled_from([1, 16, 64]),
    max_rows=st.sampled_from([1, 3, 16]),
    waves=st.sampled_from([None, 1, 2]),
    limits=st.sampled_from([(None, None), (None, None), (3, 2)]),
    pages=st.sampled_from(["many", "few"]),
    count=st.integers(1, 3),
    cancel=st.none() | st.integers(0, 40),
    prefix_cache=st.booleans(),
    latency=st.sampled_from([None, None, 1.0, 3.0]),
)
def test_tag_soup_always_ends(
    seed, max_tokens, critical, own, page_size, max_rows, waves, limits, pages, count, cancel, prefix_cache, latency
):
    requests = [
        ask(
            [TEXT, 2, 4, 5] * 8 + [5 + k],
            max_tokens=max_tokens + k,
            max_critical_tokens=critical,
            branch_max_tokens=own,
            max_concurrent_branches=waves,
        )
        for k in range(count)
    ]
    num_pages = 3000 // page_size if pages == "many" else -(-(max_tokens + 40) // page_size)
    engine = toy_engine(
        MODEL,
        sampler=SoupSampler(seed),
        page_size=page_size,
        num_pages=num_pages,
        max_rows=max_rows,
        max_paths=limits[0],
        max_depth=limits[1],
        max_step_tokens=32,
        prefix_cache=prefix_cache,
        token_latency_target_ms=latency,
        clock=jumping_clock(seed),
    )
    for request in requests:
        engine.add_request(request)
    results = {}
    for step in range(6 * count * (max_tokens + 10)):
        if not engine.has_work:
            break
        if step == cancel:
            engine.cancel(0)
        results.update((result.request_id, result) for result in engine.step())
    assert sorted(results) == list(range(count)), "hangs"
    for k, request in enumerate(requests):
        check(request, results[k], exact=limits == (None, None))
    assert_drained(engine)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    max_tokens=st.integers(20, 300),
    critical=st.none() | st.integers(10, 100),
    own=st.none() | st.integers(2, 30),
)
def test_budgets_cut_at_the_same_token_whatever_runs_beside(seed, max_tokens, critical, own):
    request = ask([TEXT], max_tokens=max_tokens, max_critical_tokens=critical, branch_max_tokens=own)
    first, *others = (
        toy_engine(MODEL, sampler=SoupSampler(seed), max_rows=rows, page_size=page_size).generate([asked])[0]
        for rows, page_size, asked in [
            (32, 1, request),
            (2, 16, request),
            (32, 16, changed(request, max_concurrent_branches=1)),
        ]
    )
    for other in others:
        assert other.token_ids == first.token_ids
        assert other.position_ids == first.position_ids
        assert other.finish_reason == first.finish_reason
        assert other.malformed == first.malformed


def test_deep_nesting():
    script: dict[tuple[tuple[int, int], ...], list[int]] = {}
    path: tuple[tuple[int, int], ...] = ()
    for _ in range(10):
        script[path] = [*goal(1), TEXT, END_PATH if path else EOS]
        path = (*path, (0, 0))
    script[path] = [TEXT, END_PATH]
    check_wide(script, depth=10)


@pytest.mark.parametrize("paths", [9, 100])
def test_many_outlines(paths):
    script = {(): [*goal(paths), EOS], **{((0, k),): [TEXT, END_PATH] for k in range(paths)}}
    check_wide(script, depth=1)


def check_wide(script, depth):
    for max_rows in (3, 200):
        engine = toy_engine(sampler=ScriptedSampler([script]), max_depth=None, max_paths=None, max_rows=max_rows)
        request = ask([TEXT], max_tokens=4000)
        result = engine.generate([request])[0]
        check(request, result, exact=True)
        assert result.finish_reason == "stop"
        assert max(b.name.count(".") + 1 for block in result.blocks for b in block.branches) == depth
        assert all(b.finish == "path_end" for block in result.blocks for b in block.branches)
        assert_drained(engine)
