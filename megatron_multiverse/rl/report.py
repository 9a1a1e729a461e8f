"""The numbers of a step: what was earned, how parallel the answers are, how the update went, where the time went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_multiverse.inference import BY_ENGINE
from megatron_multiverse.rl.loss import PolicyNumbers
from megatron_multiverse.rl.replica import Replica
from megatron_multiverse.rl.rollout import Batch
from megatron_multiverse.structure import saved_share
from megatron_multiverse.training.engine import StepResult

FAMILY_NUMBERS = ("accuracy", "trigger_ratio", "critical_length")
"""What is reported of each family of prompts."""

Columns = dict[str, npt.NDArray[Any]]
"""What is told of answers, a value of each by name; arrays of one length."""


def answer_columns(batch: Batch) -> Columns:
    """What `answer_numbers` wants to know of the answers of a step."""
    results = batch.results
    of_groups = [(group.number, group.is_settled, group.prompt.family) for group in batch.groups for _ in group.results]
    number, settled, family = zip(*of_groups, strict=True) if of_groups else ((), (), ())
    return {
        "reward": np.concatenate([np.empty(0), *(group.rewards for group in batch.groups)]),
        "right": np.concatenate([np.empty(0), *(group.correct for group in batch.groups)]) > 0.5,
        "length": np.array([len(result.token_ids) for result in results], dtype=np.float64),
        "critical_length": np.array([result.critical_tokens for result in results], dtype=np.float64),
        "forks": np.array([bool(result.blocks) for result in results]),
        "malformed": np.array([bool(result.malformed.keys() - BY_ENGINE) for result in results]),
        "truncated": np.array([result.finish_reason == "length" for result in results]),
        "dropped_tokens": np.array([result.dropped_tokens for result in results], dtype=np.int64),
        "group": np.array(number, dtype=np.int64),
        "settled": np.array(settled, dtype=bool),
        "family": np.array(family, dtype=np.str_),
    }


def step_numbers(batch: Batch, replica: Replica) -> dict[str, Any]:
    """What the answers of all replicas are like, and how long they took; collective, the same on every rank."""
    parts = replica.all_of([(answer_columns(batch), batch.rollout_s, batch.reward_s)])
    columns, rollouts, rewards = zip(*parts, strict=True)
    answers = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
    tokens, slowest = float(answers["length"].sum()), max(rollouts)
    times = {"rollout_tokens_per_s": tokens / slowest, "rollout_s": slowest, "reward_s": max(rewards)}
    return {**answer_numbers(answers), **times}


def answer_numbers(answers: Columns) -> dict[str, Any]:
    """What the answers of a step are like, those of settled groups too; `FAMILY_NUMBERS` of each family of prompts
    (`task.family_key`) as ``NAME/FAMILY``."""
    numbers = _numbers(answers)
    for family in sorted(set(answers["family"].tolist()) - {""}):
        chosen = answers["family"] == family
        own = _numbers({name: column[chosen] for name, column in answers.items()})
        numbers |= {f"{name}/{family}": own[name] for name in FAMILY_NUMBERS}
    return numbers


def _numbers(answers: Columns) -> dict[str, Any]:
    """``num_parallel`` is all tokens by all critical tokens, ``saved_share`` the mean of 1 - critical tokens / tokens
    (ThreadWeaver's eta), ``trigger_ratio`` the share of answers with a block, ``malformed`` the share whose
    structure broke, ``truncated`` the share that a budget ended. Lengths are means in tokens."""
    tokens, critical, right = answers["length"], answers["critical_length"], answers["right"]
    return {
        "reward": float(answers["reward"].mean()),
        "accuracy": float(right.mean()),
        "length": float(tokens.mean()),
        "critical_length": float(critical.mean()),
        "critical_length_right": float(critical[right].mean()) if right.any() else math.nan,
        "num_parallel": float(tokens.sum() / max(1.0, critical.sum())),
        "saved_share": saved_share(tokens, critical),
        "trigger_ratio": float(answers["forks"].mean()),
        "malformed": float(answers["malformed"].mean()),
        "truncated": float(answers["truncated"].mean()),
        "answers": len(tokens),
        "groups": len(np.unique(answers["group"])),
        "settled_groups": len(np.unique(answers["group"][answers["settled"]])),
        "dropped_tokens": int(answers["dropped_tokens"].sum()),
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
        "kl": sum(policy.kl * policy.targets for policy in policies) / count,
        "clip_share": sum(policy.clip_share * policy.targets for policy in policies) / count,
        "logprob_drift": first.drift_mean,
        "logprob_drift_max": first.drift_max,
        "ratio_far": first.ratio_far,
    }


def log_line(step: int, train_iters: int, numbers: dict[str, Any]) -> str:
    """One line for the log."""
    forks = "forks {trigger_ratio:.0%}"
    families = [name for name in numbers if name.startswith("trigger_ratio/")]
    if families:
        shares = (f"{name.partition('/')[2]} {numbers[name]:.0%}" for name in families)
        forks = f"{forks} ({', '.join(shares)})"
    cut = f" | {numbers['truncated']:.0%} cut off by a budget" if numbers["truncated"] else ""
    text = (
        "step {step}/{train_iters} | reward {reward:.3f} | right {accuracy:.1%} | {critical_length:.0f} of "
        f"{{length:.0f}} tokens on the longest chain | parallel {{num_parallel:.2f}} | {forks}{cut} | "
        "{rollout_s:.1f} s rollouts, {train_s:.1f} s training"
    ).format(step=step, train_iters=train_iters, **numbers)
    if not numbers["targets"]:
        return f"{text} | no update: all answers to each prompt earned the same"
    return text + " | loss {loss:.4f} | entropy {entropy:.3f} | drift {logprob_drift:.1e}".format(**numbers)
