"""A few real steps of reinforcement learning that are forgotten: what they take, before the run itself
(`--dry-run --dry-run-steps`); `training/trial.py` does it for supervised training."""

from __future__ import annotations

import contextlib
import logging
from statistics import fmean

from megatron_multiverse.config import RLConfig
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.model.device import choose_device
from megatron_multiverse.rl.drawing import drawing_of
from megatron_multiverse.rl.prompts import Prompts
from megatron_multiverse.rl.replica import Replica
from megatron_multiverse.rl.report import log_line
from megatron_multiverse.rl.rollout import Rollouts
from megatron_multiverse.rl.trainer import Learner, build_engine
from megatron_multiverse.training.fused_adamw import check_optimizer
from megatron_multiverse.training.metrics import MetricsWriter, format_duration
from megatron_multiverse.training.seeds import seed_everything
from megatron_multiverse.training.start import check_start, describe_model, joined_groups
from megatron_multiverse.training.trainer import check_agreement

logger = logging.getLogger(__name__)

_PARTS = {"weights_s": "weights", "rollout_s": "rollouts", "reward_s": "rewards", "train_s": "training"}


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
    base = config.train_config()
    model_config = describe_model(base, "policy.seq_length")
    check_optimizer(base, choose_device(config.device))
    tokenizer = build_tokenizer(config.task.tokenizer_type, config.tokenizer_model)
    check_start(base, tokenizer, learns_from_answers=True)
    with joined_groups(base) as ranks, contextlib.ExitStack() as closing:
        seed_everything(config.seed)
        prompts, replica = Prompts(config.task, tokenizer, config.seed), Replica.of(ranks)
        check_agreement(config, prompts, ranks)
        drawing = drawing_of(config, model_config, tokenizer, prompts, replica.count)
        engine, model, loss = build_engine(config, model_config, tokenizer, prompts)
        rollouts = Rollouts(config, model, model_config, engine.layers, tokenizer, drawing, replica)
        closing.enter_context(contextlib.closing(rollouts))
        closing.enter_context(engine.running())
        learner, metrics = Learner(config, tokenizer, prompts, engine, loss, rollouts), MetricsWriter(None, steps)
        taken = []
        for number in range(steps):
            learned = learner.step(number, lambda: False, metrics)
            assert learned is not None, "nobody asks to stop"
            taken.append(learned[1])
            if ranks.is_first:  # a step takes minutes where it is large
                logger.info(log_line(number + 1, steps, learned[1]))
        memory = max(ranks.gather(max(numbers["memory_gib"] for numbers in taken)))
    first, others = taken[0], taken[1:]
    step_s = fmean(numbers["step_time_s"] for numbers in others)
    parts = ", ".join(f"{fmean(float(one[key] or 0) for one in others):.3f} s {what}" for key, what in _PARTS.items())
    speed = sum(one["length"] * one["answers"] for one in others) / max(1e-9, sum(one["rollout_s"] for one in others))
    idle = sum(not one["targets"] for one in others)
    unlearned = f" ({idle} of them without an update: all answers to each prompt earned the same)" if idle else ""
    return (
        f"tried {steps} steps: reward {first['reward']:.3f}, {first['accuracy']:.1%} right in the first, which took "
        f"{first['step_time_s']:.1f} s; {step_s:.3g} s for each other one{unlearned}: {parts}; {speed:.0f} tokens/s "
        f"drawn, {memory:.2f} GiB on the fullest rank; all {config.train_iters} steps would take "
        f"{format_duration(step_s * config.train_iters)} without checkpoints, if answers stay as long"
    )
