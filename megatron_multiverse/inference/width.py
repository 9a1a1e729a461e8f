"""How wide a step is: which requests bring how many branches, and how many prompt tokens go along.

A step takes longer the more it computes, and everyone waits for it. So every request brings one branch, and further
branches are extra work that is taken along while it is free: while there are rows, and, where a latency is asked for,
while the step is predicted to end in time. This is decided anew in each step, since leaving a branch out costs nothing:
its pages stay. The idea is TAPER's (arXiv 2605.06914).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class StepLoad(NamedTuple):
    """What the time of a step depends on."""

    rows: int
    """Branches."""
    visible: int
    """Tokens in the cache that they see, the sum over all rows."""
    prompt: int
    """Tokens beyond one per row."""


_SCALE = np.array([1.0, 1 / 64, 1 / 65536, 1 / 512])
"""Of (1, rows, visible, prompt): each is about 1 in a large step."""
_DOUBT = np.array([1.0, 10.0, 10.0, 10.0]) * 1e-6
"""Information of the first guess, 0. The time of the first step is put down to the step itself, not to its rows."""
_FORGET = 0.1
"""Share of what was known about steps of a kind that a new step of that kind replaces."""
_SURPRISE = 0.5
"""Largest error, relative to the prediction, that a step is believed: now and then one waits for something else."""


class StepTime:
    """Seconds of a step as a linear function of its load, learned while steps run.

    Recursive least squares on relative errors with directional forgetting (Cao and Schwartz, Automatica 36, 2000): what
    the newest step says replaces older knowledge about steps like it, and nothing else is forgotten. So the price of
    prompt tokens is still known after an hour in which no prompt came.
    """

    def __init__(self) -> None:
        self._theta: Floats = np.zeros(4)
        self._information: Floats = np.diag(_DOUBT)
        self.steps = 0
        """Steps observed."""

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step that took so long."""
        if not seconds > 0:
            return
        x: Floats = np.array([1.0, *load]) * _SCALE
        predicted = float(x @ self._theta)
        error = seconds - predicted
        if self.steps >= 8:
            most = _SURPRISE * max(predicted, 1e-9)
            error = min(max(error, -most), most)
        x = x / seconds
        known = self._information @ x
        if (amount := float(x @ known)) > 0:
            self._information -= _FORGET * np.outer(known, known) / amount
        self._information += np.outer(x, x)
        self._theta = _nearest_prices(
            self._theta + np.linalg.solve(self._information, x) * (error / seconds), self._information
        )
        self.steps += 1

    @property
    def prices(self) -> tuple[float, float, float, float]:
        """Seconds of a step, of a row in it, of a token that a row sees, of a prompt token; none is negative."""
        step, row, token, prompt = (self._theta * _SCALE).tolist()
        return step, row, token, prompt

    def predict(self, load: StepLoad) -> float:
        """Seconds that a step will take."""
        step, row, token, prompt = self.prices
        return step + row * load.rows + token * load.visible + prompt * load.prompt


def _nearest_prices(theta: Floats, information: Floats) -> Floats:
    """The prices that explain the steps nearly as well as `theta`, with none below zero.

    What is negative becomes 0, and the others take over its part. Leaving it out alone would make the prediction wrong
    for good: what is learned would go on to fit with the negative price, and see no error.
    """
    negative = np.zeros(len(theta), dtype=bool)
    best = theta
    while (best < 0).any():
        negative |= best < 0
        rest = ~negative
        best = np.where(negative, 0.0, theta)
        if rest.any():
            pull = information[np.ix_(rest, negative)] @ theta[negative]
            best[rest] += np.linalg.solve(information[np.ix_(rest, rest)], pull)
    return best


class Widths(NamedTuple):
    """The limits of a step."""

    rows: list[int]
    """Branches that each request may bring."""
    prompt: int
    """Tokens beyond one per row that may enter."""


def allot(
    wanted: Sequence[Sequence[int]],
    *,
    max_rows: int,
    max_prompt: int,
    min_prompt: int = 1,
    prompt: int = 0,
    time: StepTime | None = None,
    target: float = float("inf"),
) -> Widths:
    """Share a step among requests.

    Every request gets a row; then prompts get what time is left; then requests get a second row each, a third, and so
    on, as long as there are rows and time. So of two requests that both want more, neither ever has two rows more than
    the other: what a request gets does not depend on how many branches it has.

    Args:
        wanted: for each request, in the order of their turn, the tokens that each of its branches sees.
        max_rows: most rows.
        max_prompt: most tokens beyond one per row.
        min_prompt: tokens of prompts that enter however long it takes, so that no request waits for ever.
        prompt: tokens that prompts would like to bring.
        time: predicts the time of the step.
        target: seconds that it should take at most.
    """
    widths = [0] * len(wanted)
    step, per_row, per_token, per_prompt = time.prices if time is not None else (0.0, 0.0, 0.0, 0.0)
    left, seconds = max_rows, target - step
    for k, visible in enumerate(wanted):
        if visible and left:
            widths[k], left = 1, left - 1
            seconds -= per_row + per_token * visible[0]
    room = max_prompt
    if per_prompt > 0 and seconds < max_prompt * per_prompt:
        room = min(max_prompt, max(min_prompt, int(seconds / per_prompt)))
    seconds -= per_prompt * min(room, prompt)
    turn = [k for k, visible in enumerate(wanted) if len(visible) > 1]
    level = 1
    while turn and left:
        still = []
        for k in turn:
            price = per_row + per_token * wanted[k][level]
            if left and price <= seconds:
                widths[k], left, seconds = level + 1, left - 1, seconds - price
                if len(wanted[k]) > level + 1:
                    still.append(k)
        turn, level = still, level + 1
    return Widths(widths, room)
