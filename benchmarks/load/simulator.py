"""The engine under load: real requests, scheduler, page book and grammar; in place of the model a law of step times
moves a virtual clock, and scripts say what is drawn."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.bench_host_step import PIECES, NoModel
from benchmarks.load.law import Amounts, StepLaw, amounts_of
from benchmarks.load.users import EOS, Trace, make_text, script
from megatron_multiverse.config import EngineConfig
from megatron_multiverse.inference import Engine, Request, SamplingParams, StepOutput, StepPlan
from megatron_multiverse.inference.text.branch import branch_key
from megatron_multiverse.structure import StructureVocab

SLO_SECONDS = 0.050
"""Time per token that users are promised."""
PAGE_SIZE, NUM_PAGES = 64, 32000
"""2.05 million tokens: what an H200 holds beside the weights of a 7B model at 56 KiB per token."""
COMMON: dict[str, Any] = {
    "page_size": PAGE_SIZE, "num_pages": NUM_PAGES, "max_rows": 2048, "overlap": False,
}  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """A way to choose widths."""

    name: str
    config: EngineConfig
    most_branches: int | None = None


POLICIES = (
    Policy("never fork", EngineConfig(**COMMON, token_latency_target_ms=45), most_branches=1),
    Policy("always fork", EngineConfig(**COMMON, max_step_tokens=512)),
    Policy("by step time", EngineConfig(**COMMON, token_latency_target_ms=45)),
)
"""One branch at a time; every branch at once; as many as the latency target allows. With the first, chunks of prompts
obey the target, too; without a target they are short enough (15 ms) to leave time for the decoding beside them."""


@dataclass
class Served:
    """What a user saw of one request."""

    user: int
    forks: bool
    sent: float
    times: list[float] = field(default_factory=list)
    """When tokens came, one entry for each step that gave the request any."""
    tokens: list[int] = field(default_factory=list)
    """How many came then."""

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return np.diff(self.times).tolist()

    @property
    def met(self) -> bool:
        """Whether its tokens came within the promised time, on average."""
        gaps = self.gaps
        return not gaps or sum(gaps) / len(gaps) <= SLO_SECONDS


class _Output:
    def __init__(self, output: StepOutput) -> None:
        self._output = output

    def wait(self) -> StepOutput:
        return self._output


class SimulatedRunner:
    """Stands in for `inference.step.runner.Runner`: launching a step moves the clock to its end.

    Args:
        law: of step times.
        noise: random factor of each step.
    """

    graphs = None

    def __init__(self, law: StepLaw, noise: Callable[[], float]) -> None:
        self.law = law
        self.noise = noise
        self.now = 0.0
        self.scripts: dict[int, list[int]] = {}
        self.steps: list[tuple[float, float, Amounts]] = []
        """(end, seconds, what was computed) of every step."""

    def launch(self, plan: StepPlan) -> _Output:
        """Run a step in no time."""
        amounts = amounts_of(plan, NUM_PAGES)
        seconds = self.law.seconds(amounts) * self.noise()
        self.now += seconds
        self.steps.append((self.now, seconds, amounts))
        drawn = zip(plan.sampling.keys.tolist(), plan.sampling.indices.tolist(), strict=True)
        tokens = np.array([self.scripts[key][index] for key, index in drawn], dtype=np.int64)
        none, no_ids = np.zeros((len(tokens), 0)), np.zeros((len(tokens), 0), dtype=np.int64)
        finite = np.ones(len(tokens), dtype=np.bool_)
        scores = np.zeros(0), no_ids[:0], none[:0]
        return _Output(StepOutput(tokens, np.zeros(len(tokens)), finite, no_ids, none, *scores))


class Simulation:
    """One trace under one policy.

    Args:
        trace: who sends what.
        policy: how wide steps are.
        seed: of lengths, pauses and noise.
    """

    def __init__(self, trace: Trace, policy: Policy, seed: int = 0) -> None:
        self.trace, self.policy = trace, policy
        self._rng = np.random.default_rng(seed)
        noise = np.random.default_rng(seed + 1)
        self.runner = SimulatedRunner(StepLaw(), lambda: float(noise.lognormal(0, 0.02)))
        vocab = StructureVocab.from_pieces(PIECES, eos_id=len(PIECES))
        self.engine = Engine(NoModel(), vocab, policy.config, clock=lambda: self.runner.now)
        self.engine.runner = self.runner  # type: ignore[assignment]
        self.served: list[Served] = []
        self._of_request: dict[int, Served] = {}
        self._next: list[tuple[float, int]] = [(0.0, 0)]  # (when, user) of the next questions, a heap
        self._users = 1  # who have come so far
        self._documents: dict[int, list[int]] = {}
        self.start = 0.0
        """When the trace begins, by the runner's clock."""

    def run(self) -> Simulation:
        """Serve the trace to its end; what is unfinished then stays so."""
        self._fill_cache()
        while self.now < self.trace.seconds:
            self._ask()
            if self.engine.has_work:
                for result in self.engine.step():
                    user = self._of_request[result.request_id].user
                    pause = float(self._rng.exponential(self.trace.think))
                    heapq.heappush(self._next, (self.now + pause, user))
            else:
                self.runner.now += max(1e-3, min([when for when, _ in self._next], default=0.0) - self.now)
        return self

    @property
    def now(self) -> float:
        """Seconds since the trace began."""
        return self.runner.now - self.start

    def _fill_cache(self) -> None:
        """Before the trace, every user has asked about a document."""
        requests = []
        for user in range(self.trace.most_users):
            self._documents[user] = make_text(self.trace.document, self._rng)
            self.runner.scripts[branch_key(0, -1 - user, ())] = [EOS]
            requests.append(Request(prompt_ids=self._documents[user], sample=-1 - user))
        self.engine.generate(requests)
        self.start, self.runner.steps = self.runner.now, []

    def _ask(self) -> None:
        """Whoever has a question sends it; users beyond those that there are now leave instead, others come."""
        now, users = self.now, self.trace.users_at(self.now)
        while self._users < users:
            heapq.heappush(self._next, (now + float(self._rng.uniform(0, 1)), self._users))
            self._users += 1
        self._users = min(self._users, users) if users else self._users
        while self._next and self._next[0][0] <= now:
            when, user = heapq.heappop(self._next)
            if user < users:
                self._send(when, user)

    def _send(self, when: float, user: int) -> None:
        number = len(self.served)
        forks = (user * 0.618) % 1 < self.trace.forking  # spread evenly over the users
        rng = np.random.default_rng([number, 7])
        if rng.uniform() < self.trace.new_document:
            self._documents[user] = make_text(self.trace.document, rng)
        request = Request(
            prompt_ids=self._documents[user] + make_text(self.trace.question, rng),
            sampling=SamplingParams(max_tokens=1 << 15, max_concurrent_branches=self.policy.most_branches),
            sample=number,
        )
        self.runner.scripts |= script(self.trace, forks=forks, number=number, rng=rng)
        served = Served(user, forks, when)
        self.served.append(served)
        self._of_request[self.engine.add_request(request, on_token=self._hear)] = served

    def _hear(self, request_id: int, branch: str, ids: list[int]) -> None:
        served = self._of_request[request_id]
        if served.times and served.times[-1] == self.now:
            served.tokens[-1] += len(ids)
        else:
            served.times.append(self.now)
            served.tokens.append(len(ids))


def summary(simulation: Simulation) -> dict[str, float | None]:
    """Figures of a run."""
    served = [request for request in simulation.served if request.times]
    met = [request for request in served if request.met]
    total = sum(sum(request.tokens) for request in served)
    serial = [gap for request in served if not request.forks for gap in request.gaps]
    first = [request.times[0] - request.sent for request in served]
    steps = simulation.runner.steps
    return {
        "goodput_tokens_per_second": sum(sum(request.tokens) for request in met) / simulation.trace.seconds,
        "tokens_per_second": total / simulation.trace.seconds,
        "requests_within_slo": len(met) / len(served),
        "serial_gap_p50_ms": 1000 * float(np.median(serial)) if serial else None,
        "serial_gap_p99_ms": 1000 * float(np.quantile(serial, 0.99)) if serial else None,
        "first_token_p50_s": float(np.median(first)),
        "first_token_p99_s": float(np.quantile(first, 0.99)),
        "step_p99_ms": 1000 * float(np.quantile([seconds for _, seconds, _ in steps], 0.99)),
        "mean_rows": float(np.average([a.rows for _, _, a in steps], weights=[seconds for _, seconds, _ in steps])),
    }


def series(simulation: Simulation) -> dict[str, list[float]]:
    """What happened in each second: users, the mean step, its rows, tokens of requests that kept the promise."""
    seconds = np.arange(int(simulation.trace.seconds))
    ends = np.array([end - simulation.start for end, _, _ in simulation.runner.steps])
    bins = np.minimum(ends.astype(np.int64), seconds[-1])
    count = np.maximum(np.bincount(bins, minlength=len(seconds)), 1)

    def mean(values: list[float]) -> list[float]:
        means: list[float] = np.round(np.bincount(bins, weights=values, minlength=len(seconds)) / count, 2).tolist()
        return means

    good = np.zeros(len(seconds))
    for request in simulation.served:
        if request.met:
            np.add.at(good, np.minimum(np.array(request.times, dtype=np.int64), seconds[-1]), request.tokens)
    return {
        "seconds": [float(second) for second in seconds],
        "users": [float(simulation.trace.users_at(float(second))) for second in seconds],
        "step_ms": mean([1000 * taken for _, taken, _ in simulation.runner.steps]),
        "rows": mean([float(amounts.rows) for _, _, amounts in simulation.runner.steps]),
        "good_tokens": good.tolist(),
    }
