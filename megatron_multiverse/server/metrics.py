"""Prometheus metrics. Seconds and tokens; names begin with `multiverse_`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server.engine_client import EngineClient
from megatron_multiverse.server.wire import STEP_SECONDS

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
PARALLELISM = (1, 1.1, 1.25, 1.5, 2, 3, 4, 6, 8, 16)

_GAUGES = {
    "running": ("requests_running", "Answers with a place in the cache"),
    "waiting": ("requests_waiting", "Answers that wait for a place in the cache"),
    "branches": ("branches_running", "Branches with a place in the cache"),
    "pages_free": ("cache_pages_free", "Pages of the cache that nobody owns"),
    "pages_cached": ("cache_pages_cached", "Pages, free or owned, that requests with the same beginning would find"),
    "steps": ("engine_steps", "Steps of the engine since it started"),
    "copied_tokens": ("cache_copied_tokens", "Tokens of the cache that forks and joins have copied"),
    "graph_steps": ("engine_graph_steps", "Those of them that replayed a CUDA graph"),
}


class _StepTimes(Collector):
    """What the engine last said of its steps, which it counts itself."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterator[HistogramMetricFamily]:
        counts = self._client.stats.get("step_counts", [0] * (len(STEP_SECONDS) + 1))
        bounds = [*(f"{bound:g}" for bound in STEP_SECONDS), "+Inf"]
        buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
        total = self._client.stats.get("step_seconds", 0.0)
        text = "Seconds of a step of the engine"
        yield HistogramMetricFamily("multiverse_step_seconds", text, buckets=buckets, sum_value=total)


class Metrics:
    """Counters, gauges and histograms of one server, in a registry of their own.

    Args:
        client: whose engine is measured.
    """

    def __init__(self, client: EngineClient) -> None:
        self.registry = registry = CollectorRegistry()
        for key, (name, text) in _GAUGES.items():
            gauge = Gauge(f"multiverse_{name}", text, registry=registry)
            gauge.set_function(lambda key=key: client.stats.get(key, 0))  # type: ignore[misc]
        Gauge("multiverse_queue", "Answers in the making, at the HTTP side", registry=registry).set_function(
            lambda: client.num_generations
        )
        Gauge("multiverse_cache_pages", "Pages of the cache", registry=registry).set_function(
            lambda: client.facts.get("num_pages", 0)
        )
        Gauge("multiverse_engine_up", "1 if the engine is ready", registry=registry).set_function(
            lambda: float(client.condition == "ready")
        )
        registry.register(_StepTimes(client))
        self.responses = Counter("multiverse_http_responses", "HTTP responses", ["route", "status"], registry=registry)
        self._finished = Counter("multiverse_answers", "Complete answers", ["finish_reason"], registry=registry)
        self._tokens = Counter("multiverse_tokens", "Tokens", ["kind"], registry=registry)
        self._blocks = Counter("multiverse_blocks", "Parallel blocks: forks, each with its join", registry=registry)
        self._branches = Counter("multiverse_branches", "Paths of parallel blocks", registry=registry)
        self._late = Counter(
            "multiverse_late_branches",
            "Paths that began when one of their block had ended: later waves",
            registry=registry,
        )
        self._malformed = Counter("multiverse_malformed", "Output that broke the grammar", ["code"], registry=registry)
        self._preemptions = Counter("multiverse_preemptions", "Times an answer stepped back", registry=registry)
        self.first_token = Histogram(
            "multiverse_time_to_first_token_seconds",
            "From the request to its first token; streams only",
            buckets=LATENCIES,
            registry=registry,
        )
        self._per_token = Histogram(
            "multiverse_time_per_output_token_seconds",
            "Seconds of an answer over its tokens",
            buckets=(0.001, 0.0025, *LATENCIES[:9]),
            registry=registry,
        )
        self._latency = Histogram(
            "multiverse_request_seconds",
            "From the request to its complete answer",
            buckets=LATENCIES,
            registry=registry,
        )
        self._parallel = Histogram(
            "multiverse_num_parallel",
            "Tokens of an answer over those of its longest chain",
            buckets=PARALLELISM,
            registry=registry,
        )

    def answered(self, result: Result, seconds: float) -> None:
        """Count a complete answer, and how long it took."""
        self._finished.labels(result.finish_reason).inc()
        for kind, count in {
            "prompt": len(result.prompt_ids),
            "cached_prompt": result.cached_tokens,
            "generated": len(result.token_ids),
            "critical": result.critical_tokens,
        }.items():
            self._tokens.labels(kind).inc(count)
        self._blocks.inc(len(result.blocks))
        self._branches.inc(sum(len(block.branches) for block in result.blocks))
        self._late.inc(result.late_paths)
        for code, count in result.malformed.items():
            self._malformed.labels(code).inc(count)
        self._preemptions.inc(result.preemptions)
        self._latency.observe(seconds)
        if result.token_ids:
            self._per_token.observe(seconds / len(result.token_ids))
            self._parallel.observe(result.num_parallel)
