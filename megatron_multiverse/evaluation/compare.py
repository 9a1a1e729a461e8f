"""Two runs against each other, problem by problem: does one solve more, and how much sooner does it answer?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.evaluation.samples import Sample
from megatron_multiverse.evaluation.scores import Setting, problem_means

RESAMPLES = 10_000
_CHUNK = 500  # resamples at a time, which bounds the memory


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval, by the bootstrap over problems."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The second run against the first, over the problems that both have answered."""

    task: str
    budget: int | None
    first: str
    second: str
    """How each was asked to think."""
    problems: int
    unpaired: int
    """Problems that only one of them has answered; they are left out."""
    accuracy: tuple[float, float]
    difference: Interval
    """Accuracy of the second minus accuracy of the first."""
    p_value: float
    """Two-sided: how often resampled problems give no difference, or one of the other sign."""
    speedup: Interval
    """Net speed-up: mean seconds of an answer of the first over those of the second."""
    step_speedup: Interval
    """The same of tokens on the longest chain."""
    concurrency: tuple[list[int], list[int]]

    @property
    def label(self) -> str:
        """For rows and axes."""
        thinking = self.first if self.first == self.second else f"{self.first} / {self.second}"
        return f"{self.task}, {thinking}" + ("" if self.budget is None else f", budget {self.budget}")


def compare_runs(first: Sequence[Sample], second: Sequence[Sample], *, seed: int = 0) -> list[Comparison]:
    """Compare each setting of two runs.

    Settings of the same task and budget are paired. Where both runs were asked to think in one way only, these ways may
    differ: an autoregressive model beside a Multiverse model.

    Args:
        first: samples of the run that is compared with.
        second: samples of the other.
        seed: of the bootstrap.

    Raises:
        ConfigError: no setting, or no problem, is in both.
    """
    ours, theirs = _by_setting(first), _by_setting(second)
    is_single = all(len({setting.thinking for setting in groups}) == 1 for groups in (ours, theirs))
    pairs = [
        (one, other)
        for one in ours
        for other in theirs
        if (one.task, one.budget) == (other.task, other.budget) and (is_single or one.thinking == other.thinking)
    ]
    compared = [_compare(one, ours[one], other, theirs[other], seed) for one, other in pairs]
    if not compared:
        raise ConfigError(
            f"the runs share no setting: the first has {_names(ours)}; the second {_names(theirs)}. Compare runs of "
            "the same tasks, budgets and ways of thinking"
        )
    return compared


def _names(groups: Mapping[Setting, object]) -> str:
    return "; ".join(setting.label for setting in groups) or "no samples"


def _by_setting(samples: Sequence[Sample]) -> dict[Setting, list[Sample]]:
    groups: dict[Setting, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(Setting(sample.task, sample.thinking, sample.budget), []).append(sample)
    return groups


def _compare(one: Setting, first: list[Sample], other: Setting, second: list[Sample], seed: int) -> Comparison:
    names = {sample.problem for sample in first} & {sample.problem for sample in second}
    if not names:
        raise ConfigError(f"{one.task}: the runs share no problem; were they made with other --data?")
    all_names = {sample.problem for sample in [*first, *second]}

    def pair(column: str) -> np.ndarray:
        means = [problem_means(samples, column) for samples in (first, second)]
        return np.array([[mean[name] for name in sorted(names)] for mean in means])

    right, seconds, steps = pair("correct"), pair("seconds"), pair("critical_tokens")
    drawn = _resampled_means([right, seconds, steps], seed)
    differences = drawn[0][:, 1] - drawn[0][:, 0]
    tails = (float(np.mean(differences <= 0)), float(np.mean(differences >= 0)))
    return Comparison(
        task=one.task,
        budget=one.budget,
        first=one.thinking,
        second=other.thinking,
        problems=len(names),
        unpaired=len(all_names) - len(names),
        accuracy=(float(right[0].mean()), float(right[1].mean())),
        difference=_interval(float(right[1].mean() - right[0].mean()), differences),
        p_value=min(1.0, 2 * min(tails)),
        speedup=_ratio(seconds, drawn[1]),
        step_speedup=_ratio(steps, drawn[2]),
        concurrency=(_concurrency(first), _concurrency(second)),
    )


def _resampled_means(pairs: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """For each [2, problems] the means of both rows over problems drawn with replacement, [RESAMPLES, 2]; the same
    problems for all of them."""
    rng = np.random.default_rng(seed)
    count = pairs[0].shape[1]
    means: list[list[np.ndarray]] = [[] for _ in pairs]
    for start in range(0, RESAMPLES, _CHUNK):
        drawn = rng.integers(0, count, size=(min(_CHUNK, RESAMPLES - start), count))
        for found, pair in zip(means, pairs, strict=True):
            found.append(pair[:, drawn].mean(axis=2).T)
    return [np.concatenate(found) for found in means]


def _ratio(pair: np.ndarray, drawn: np.ndarray) -> Interval:
    tiny = np.finfo(np.float64).tiny
    value = float(pair[0].mean() / max(pair[1].mean(), tiny))
    return _interval(value, drawn[:, 0] / np.maximum(drawn[:, 1], tiny))


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _concurrency(samples: Sequence[Sample]) -> list[int]:
    return sorted({sample.concurrency for sample in samples})
