"""What docs/serving.md quotes from results."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.quoted import source


def serving() -> Iterator[str]:
    """docs/serving.md."""
    yield from _overhead()
    yield from _soak()
    yield from _stalls()
    yield from _reprefill()


def _overhead() -> Iterator[str]:
    """What HTTP costs."""
    overhead = source.results("results/server_h200")["overhead"]
    one, many = (median(row["server_whole"]) / median(row["engine"]) for row in overhead["tokens_per_second"])
    first = {name: median(overhead["first_token_ms"][name]) for name in ("server", "engine")}
    yield f"tokens at {one:.3f} (batch 1) and {many:.3f} (32) of the engine's own rate"
    yield f"comes after {first['server']:.0f} ms, {first['engine']:.0f} of them the engine's"


def _soak() -> Iterator[str]:
    """Random clients at a server with a small cache, whose processes are killed in the end."""
    found = source.results("results/server_soak_cpu")
    assert found["ok"] and not found["hangs"] + found["num_wrong"] + found["pages_missing_in_the_end"]
    engine_killed, rank_killed = (
        found[name]["seconds_until_all_heard"] for name in ("engine_killed", "one_of_two_ranks_killed")
    )
    yield f"One run of {found['seconds'] / 60:.0f} minutes"
    yield (
        f"{found['requests']:,} requests, {found['kinds']['malformed']:,} of them malformed, "
        f"{found['answers_compared']:,} answers compared, {found['preemptions']} preemptions; no hang, no wrong "
        "status, no other answer, no page missing"
    )
    yield f"killed engine within {engine_killed + 0.05:.1f} s, of the killed rank within {rank_killed + 0.05:.1f} s"


def _stalls() -> Iterator[str]:
    """The engine's steps while clients disturb the server."""
    stalls = source.results("results/server_stalls_cpu")["stalls"]
    alone, disturbed = ([turn for turn in stalls["turns"] if turn["kind"] == kind] for kind in ("alone", "disturbed"))
    rate = sum(turn["disturbances"] for turn in disturbed) / (len(disturbed) * stalls["seconds"])
    before, after = (median(turn["p50_ms"] for turn in turns) for turns in (alone, disturbed))
    late_before, late_after = (median(turn["p99_ms"] for turn in turns) for turns in (alone, disturbed))
    yield f"on {stalls['cores']} cores some {round(rate, -1):.0f} disturbances a second"
    yield (
        f"median step from {before:.0f} to {after:.0f} ms, the 99th percentile from {late_before:.0f} to "
        f"{late_after:.0f} ms"
    )
    steps, longest = sum(turn["steps"] for turn in disturbed), max(turn["longest_ms"] for turn in disturbed)
    yield f"the longest of {steps:,} steps was {longest:.0f} ms"


def _reprefill() -> Iterator[str]:
    """Parallel blocks through a server that knows none."""
    found = source.results("results/server_reprefill_cpu")["reprefill"]
    ours, theirs, moved = found["engine"], found["reprefill"], found["moved"]
    assert ours["right"] == theirs["right"] == 1
    later = moved["later paths"]
    yield f"largest move {max(moved[name]['largest'] for name in ('first paths', 'after the join')):.3f}"
    yield (
        f"move by {later['mean']:.2f} on average, and by {later['largest']:.1f} at most; "
        f"{100 * later['still_likeliest']:.1f} % of them stay the likeliest. All {found['problems']} answers are right"
    )
    yield (
        f"An answer takes {theirs['requests']} requests that read {theirs['prompt_tokens']:.0f} tokens of prompts in "
        f"all, where the engine reads {ours['prompt_tokens']:.0f}"
    )
