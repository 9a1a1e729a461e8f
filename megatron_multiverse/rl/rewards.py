"""What an answer earns. A reward is a function of one `Graded` answer; speed is told by a group."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_multiverse.config import RewardConfig
from megatron_multiverse.errors import ConfigError, TrainingError
from megatron_multiverse.grading import is_right, stated_answer
from megatron_multiverse.inference import Result
from megatron_multiverse.rl.prompts import Prompt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Graded:
    """An answer as reward functions see it."""

    prompt: Prompt
    """What was asked, with the right answer."""
    text: str
    """The answer, tags kept."""
    result: Result
    """Everything known about it: tokens, blocks, why it ended."""


Reward = Callable[[Graded], float]


def exact(answer: Graded) -> float:
    """1 where the answer states the very words of the right one."""
    stated = stated_answer(answer.text)
    return float(stated is not None and stated.split() == answer.prompt.gold.split())


def math(answer: Graded) -> float:
    """1 where the answer states the same value as the right one, by math-verify (`grading.is_right`)."""
    return float(is_right(answer.prompt.gold, stated_answer(answer.text)))


def well_formed(answer: Graded) -> float:
    """1 where the answer ended by itself, and its structure was neither broken nor closed by the engine."""
    return float(answer.result.finish_reason == "stop" and not answer.result.malformed)


REWARDS: dict[str, Reward] = {"exact": exact, "math": math, "format": well_formed}


def find_reward(name: str) -> Reward:
    """The reward function of this name, or at this import path (package.module:function).

    Raises:
        ConfigError: there is none.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigError(f"there is no reward {name!r}: take {', '.join(REWARDS)}, or name package.module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the reward {name} cannot be imported ({error}): put its folder on PYTHONPATH, or correct the name"
        ) from error
    if not callable(found):
        raise ConfigError(f"the reward {name} is no function, but {type(found).__name__}")
    reward: Reward = found
    return reward


class Grader:
    """Grades the answers of groups.

    Raises:
        ConfigError: a reward function cannot be found.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._correct = find_reward(config.correct)
        self._extra = [(name, find_reward(name), weight) for name, weight in config.extra.items()]

    def grade(self, answers: Sequence[Graded], step: int) -> tuple[Floats, Floats]:
        """The group's marks for being right, and its rewards, each [answers].

        Args:
            answers: all answers to one prompt.
            step: steps done, for the annealing of the speed bonus.

        Raises:
            TrainingError: a reward function raised, or gave no finite number.
        """
        correct = np.array([_call(self.config.correct, self._correct, answer) for answer in answers])
        rewards = correct + sum(
            weight * np.array([_call(name, function, answer) for answer in answers])
            for name, function, weight in self._extra
        )
        lengths = np.array([answer.result.critical_tokens for answer in answers], dtype=np.float64)
        return correct, rewards + speed_bonus(lengths, correct > 0.5, self.config.speed_at(step), self.config.speed_cap)


def speed_bonus(critical_tokens: Floats, right: npt.NDArray[np.bool_], factor: float, cap: float) -> Floats:
    """What right answers earn for a short longest chain, relative to the other right answers of their group.

    ThreadWeaver (arXiv 2512.07843) pays a capped share of 1 - critical / total tokens, which also pays for writing more
    in parallel. Comparing critical tokens with those of the group pays only for being done sooner, sequentially or not.

    Args:
        critical_tokens: [answers], of each answer's longest chain.
        right: [answers].
        factor: bonus of an answer that takes no time at all.
        cap: largest bonus or malus.

    Returns:
        [answers], 0 for wrong ones.
    """
    if not factor or not right.any():
        return np.zeros(len(right))
    relative = 1 - critical_tokens / max(1.0, float(critical_tokens[right].mean()))
    return np.where(right, np.clip(factor * relative, -cap, cap), 0.0)


def _call(name: str, reward: Reward, answer: Graded) -> float:
    try:
        value = float(reward(answer))
    except Exception as error:
        raise TrainingError(
            f"the reward {name} raised {error!r} for the answer {answer.text[-200:]!r}; it must take any answer"
        ) from error
    if not np.isfinite(value):
        raise TrainingError(f"the reward {name} gave {value}; it must give a finite number")
    return value
