"""What the samples of a run come to. All figures of the report are computed here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_multiverse.evaluation.samples import Sample
from megatron_multiverse.evaluation.tasks import Thinking
from megatron_multiverse.inference import BY_ENGINE
from megatron_multiverse.structure import acceleration_ratio


class Setting(NamedTuple):
    """Samples that are summed up together."""

    task: str
    thinking: Thinking
    budget: int | None

    @property
    def label(self) -> str:
        """For rows and axes."""
        budget = "" if self.budget is None else f", budget {self.budget}"
        return f"{self.task}, {self.thinking}{budget}"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Figures of one setting; lengths in tokens, times in seconds. Means are over answers unless said otherwise."""

    samples: int
    problems: int
    seeds: int
    accuracy: float
    """pass@1: the mean over problems of the share of right answers; with k seeds, avg@k."""
    stderr_seeds: float | None
    """Standard error of the mean over seeds; None for one seed."""
    stderr_problems: float | None
    """Standard error over problems: how much another draw of problems would move it; None for one problem."""
    any_correct: float
    """Share of problems with at least one right answer."""
    no_answer: float
    """Share of answers that state none."""
    num_parallel: float
    """All tokens over all tokens on longest chains: the paper's # parallel."""
    acceleration_ratio: float
    """Mean over answers of tokens over tokens on the longest chain."""
    token_latency: float
    """Mean tokens on the longest chain."""
    trigger_ratio: float
    """Share of answers with a block."""
    blocks: float
    paths: float
    """Mean per answer."""
    malformed: float
    """Share of answers that broke the grammar."""
    closed: float
    """Share of answers of which the engine ended a thought or a path, or refused a block: as their budget wanted it, or
    since the model had ended its text there, which is malformed, too."""
    malformed_codes: dict[str, int]
    """How often each of either came, see `Result.malformed`."""
    truncated: float
    """Share of answers that spent their budget."""
    tokens: float
    """Mean per answer, of all branches."""
    decode_steps: float
    seconds: float
    """Mean wall clock of an answer while `concurrency` of them were under way."""
    seconds_per_token: float
    """All seconds over all tokens."""
    concurrency: list[int]


def score_settings(samples: Iterable[Sample]) -> dict[Setting, Score]:
    """The score of each setting, in the order in which they first come."""
    groups: dict[Setting, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(Setting(sample.task, sample.thinking, sample.budget), []).append(sample)
    return {setting: score(group) for setting, group in groups.items()}


def score(samples: Sequence[Sample]) -> Score:
    """The figures of samples of one setting.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("there is nothing to score: samples is empty")
    by_problem, by_seed = _shares(samples)
    tokens, critical = _column(samples, "tokens"), _column(samples, "critical_tokens")
    codes: Counter[str] = Counter()
    for sample in samples:
        codes.update(sample.malformed)
    seconds = _column(samples, "seconds")
    return Score(
        samples=len(samples),
        problems=len(by_problem),
        seeds=len(by_seed),
        accuracy=float(np.mean(list(by_problem.values()))),
        stderr_seeds=_stderr(list(by_seed.values())),
        stderr_problems=_stderr(list(by_problem.values())),
        any_correct=float(np.mean([share > 0 for share in by_problem.values()])),
        no_answer=float(np.mean([sample.answer is None for sample in samples])),
        num_parallel=float(tokens.sum() / max(critical.sum(), 1)),
        acceleration_ratio=acceleration_ratio(tokens, critical),
        token_latency=float(critical.mean()),
        trigger_ratio=float(np.mean(_column(samples, "blocks") > 0)),
        blocks=float(_column(samples, "blocks").mean()),
        paths=float(_column(samples, "paths").mean()),
        malformed=float(np.mean([bool(sample.malformed.keys() - BY_ENGINE) for sample in samples])),
        closed=float(np.mean([bool(sample.malformed.keys() & BY_ENGINE) for sample in samples])),
        malformed_codes=dict(codes),
        truncated=float(np.mean([sample.finish_reason == "length" for sample in samples])),
        tokens=float(tokens.mean()),
        decode_steps=float(_column(samples, "decode_steps").mean()),
        seconds=float(seconds.mean()),
        seconds_per_token=float(seconds.sum() / max(tokens.sum(), 1)),
        concurrency=sorted({sample.concurrency for sample in samples}),
    )


def problem_means(samples: Iterable[Sample], name: str) -> dict[str, float]:
    """The mean over its answers of one number, for each problem."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        found.setdefault(sample.problem, []).append(float(getattr(sample, name)))
    return {problem: float(np.mean(values)) for problem, values in found.items()}


def _shares(samples: Sequence[Sample]) -> tuple[dict[str, float], dict[int, float]]:
    """Share of right answers by problem, and by seed."""
    by_seed: dict[int, list[bool]] = {}
    for sample in samples:
        by_seed.setdefault(sample.seed, []).append(sample.correct)
    return problem_means(samples, "correct"), {seed: float(np.mean(right)) for seed, right in by_seed.items()}


def _column(samples: Sequence[Sample], name: str) -> np.ndarray:
    return np.array([getattr(sample, name) for sample in samples], dtype=np.float64)


def _stderr(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
