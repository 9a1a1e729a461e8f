"""How much better an answer is than others to the same prompt."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt


def group_advantages(
    rewards: npt.NDArray[np.float64],
    *,
    baseline: Literal["group", "leave_one_out"] = "group",
    scale: Literal["std", "none"] = "std",
) -> npt.NDArray[np.float64]:
    """Advantages of the answers of one group.

    Args:
        rewards: [n], at least two.
        baseline: the mean of all rewards (GRPO, arXiv 2402.03300), or of the other ones (RLOO, arXiv 2402.14740).
        scale: divide by the standard deviation of the group's rewards, or leave them as they are.

    Returns:
        [n]; all 0 where the rewards are equal.
    """
    count = len(rewards)
    if is_settled(rewards):
        return np.zeros(count)
    advantages: npt.NDArray[np.float64] = rewards - rewards.mean()
    if baseline == "leave_one_out":
        advantages *= count / (count - 1)
    if scale == "std":
        advantages /= rewards.std(ddof=1)
    return advantages


def is_settled(rewards: npt.NDArray[np.float64]) -> bool:
    """Whether all answers of a group earned the same, so that nothing can be learned from them."""
    return bool(np.ptp(rewards) < 1e-9)
