"""The numbers of a step: what was earned, how parallel the answers are, how the update went, where the time went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_multiverse.rl.loss import PolicyNumbers
from megatron_multiverse.rl.rollout import Batch
from megatron_multiverse.training.engine import StepResult


def answer_numbers(batch: Batch) -> dict[str, Any]:
    """What the answers of a step are like; all of them count, those of settled groups too.

    ``num_parallel`` is all tokens by all critical tokens, ``acceleration_ratio`` the mean of 1 - critical tokens /
    tokens (ThreadWeaver's eta), ``trigger_ratio`` the share of answers with a block, ``malformed`` the share whose
    structure broke, ``truncated`` the share that a budget ended. Lengths are means in tokens.
    """
    results, groups = batch.results, batch.groups
    tokens = np.array([len(result.token_ids) for result in results], dtype=np.float64)
    critical = np.array([result.critical_tokens for result in results], dtype=np.float64)
    correct = np.concatenate([group.correct for group in groups])
    right = correct > 0.5
    return {
        "reward": float(np.concatenate([group.rewards for group in groups]).mean()),
        "accuracy": float(right.mean()),
        "length": float(tokens.mean()),
        "critical_length": float(critical.mean()),
        "critical_length_right": float(critical[right].mean()) if right.any() else math.nan,
        "num_parallel": float(tokens.sum() / max(1.0, critical.sum())),
        "acceleration_ratio": float(np.mean((tokens - critical) / np.maximum(1, tokens))),
        "trigger_ratio": float(np.mean([bool(result.blocks) for result in results])),
        "malformed": float(np.mean([bool(result.malformed) for result in results])),
        "truncated": float(np.mean([result.finish_reason == "length" for result in results])),
        "answers": len(results),
        "groups": len(groups),
        "settled_groups": sum(group.is_settled for group in groups),
        "dropped_tokens": sum(result.dropped_tokens for result in results),
        "rollout_tokens_per_s": float(tokens.sum() / batch.rollout_s),
        "rollout_s": batch.rollout_s,
        "reward_s": batch.reward_s,
    }


def update_numbers(updates: Sequence[tuple[StepResult, PolicyNumbers]]) -> dict[str, Any]:
    """What the updates of a step did. The drift is that of the first one, before which the engine and the trainer have
    the same weights, the gradient norm that of the last; the other numbers are means over all targets."""
    if not updates:
        return {"targets": 0}
    results, policies = zip(*updates, strict=True)
    count, first = sum(policy.targets for policy in policies), policies[0]
    return {
        "loss": sum(float(result.loss_sum) for result in results) / count,
        "grad_norm": float(results[-1].grad_norm),
        "train_tokens": sum(result.tokens for result in results),
        "targets": count,
        "entropy": sum(policy.entropy * policy.targets for policy in policies) / count,
        "clip_share": sum(policy.clip_share * policy.targets for policy in policies) / count,
        "logprob_drift": first.drift_mean,
        "logprob_drift_max": first.drift_max,
        "ratio_far": first.ratio_far,
    }


def log_line(step: int, train_iters: int, numbers: dict[str, Any]) -> str:
    """One line for the log."""
    text = (
        "step {step}/{train_iters} | reward {reward:.3f} | right {accuracy:.1%} | {critical_length:.0f} of "
        "{length:.0f} tokens on the longest chain | parallel {num_parallel:.2f} | forks {trigger_ratio:.0%} | "
        "{rollout_s:.1f} s rollouts, {train_s:.1f} s training"
    ).format(step=step, train_iters=train_iters, **numbers)
    if not numbers["targets"]:
        return f"{text} | no update: all answers to each prompt earned the same"
    return text + " | loss {loss:.4f} | entropy {entropy:.3f} | drift {logprob_drift:.1e}".format(**numbers)
