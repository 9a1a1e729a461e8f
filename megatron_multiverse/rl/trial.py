"""A few real steps of reinforcement learning that are forgotten: what they take, before the run itself
(`--dry-run --dry-run-steps`); `training/trial.py` does it for supervised training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from megatron_multiverse.config import RLConfig
from megatron_multiverse.rl.report import log_line
from megatron_multiverse.rl.trainer import built_learner, describe_start
from megatron_multiverse.training.metrics import MetricsWriter, format_duration
from megatron_multiverse.training.start import joined_groups

logger = logging.getLogger(__name__)

_PARTS = {"weights_s": "weights", "rollout_s": "rollouts", "reward_s": "rewards", "train_s": "training"}
_SETTLED = "all answers to each prompt earned the same"


def try_steps(config: RLConfig, steps: int) -> str:
    """Take the first steps of a run, whatever its folder holds, and save nothing.

    Args:
        config: the run. All its ranks call this, under torchrun or srun.
        steps: at least 2. In the first one kernels are compiled and buffers made, so it is not timed.

    Returns:
        A line on rewards, times and the memory of the fullest rank, on every rank.

    Raises:
        MultiverseError: see `trainer.train`.
    """
    model_config, tokenizer = describe_start(config)
    with (
        joined_groups(config.train_config()) as ranks,
        built_learner(config, model_config, tokenizer, ranks) as learner,
        learner.engine.running(),
    ):
        metrics, taken = MetricsWriter(None, steps), []
        for number in range(steps):
            learned = learner.step(number, lambda: False, metrics)
            assert learned is not None, "nobody asks to stop"
            taken.append(learned[1])
            if ranks.is_first:  # a step takes minutes where it is large
                logger.info(log_line(number + 1, steps, learned[1]))
        memory = max(ranks.gather(max(numbers["memory_gib"] for numbers in taken)))
    return summary(taken, memory, config.train_iters)


def summary(taken: Sequence[dict[str, Any]], memory_gib: float, train_iters: int) -> str:
    """The line on steps that were tried.

    Args:
        taken: the numbers of each, at least 2.
        memory_gib: of the fullest rank.
        train_iters: steps of the whole run.
    """
    first, others = taken[0], taken[1:]
    step_s = fmean(numbers["step_time_s"] for numbers in others)
    parts = ", ".join(f"{fmean(float(one[key] or 0) for one in others):.3f} s {what}" for key, what in _PARTS.items())
    speed = sum(one["length"] * one["answers"] for one in others) / max(1e-9, sum(one["rollout_s"] for one in others))
    total = format_duration(step_s * train_iters)
    idle, unlearned, warning = sum(not one["targets"] for one in others), "", ""
    if idle == len(others):
        total = f"at least {total}"  # no update was timed
    if not any(one["targets"] for one in taken):
        warning = (
            f"; no step had an update ({_SETTLED}), so the memory is without gradients, activations and optimizer, and "
            "the time is a lower bound"
        )
    elif idle:
        unlearned = f" ({idle} of them without an update: {_SETTLED})"
    return (
        f"tried {len(taken)} steps: reward {first['reward']:.3f}, {first['accuracy']:.1%} right in the first, which "
        f"took {first['step_time_s']:.1f} s; {step_s:.3g} s for each other one{unlearned}: {parts}; {speed:.0f} "
        f"tokens/s drawn, {memory_gib:.2f} GiB on the fullest rank; all {train_iters} steps would take {total} without "
        f"checkpoints, if answers stay as long{warning}"
    )
