"""What tokens cost: a small dated table, which a file can replace."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_multiverse.curation.exchange import Request, Usage
from megatron_multiverse.errors import ConfigError

_BYTES_PER_TOKEN = 2
"""Fewer than any text of ours has, so that the dearest case is never underestimated."""


@dataclass(frozen=True)
class Rates:
    """Dollars per million tokens."""

    input: float
    output: float
    cache_write: float
    cache_read: float


@dataclass(frozen=True)
class Prices:
    """The rates of one model.

    Attributes:
        rates: of ordinary prompts.
        long_rates: of prompts with more than `long_prompt` tokens, if they differ.
        batch_discount: what a batch costs of the live price.
        dated: when the table was made.
    """

    rates: Rates
    batch_discount: float
    dated: str
    long_prompt: int | None = None
    long_rates: Rates | None = None

    def cost(self, usage: Usage, *, is_batch: bool) -> float:
        """Dollars of one answer."""
        prompt = usage.input + usage.cache_write + usage.cache_read
        rates = self.rates
        if self.long_rates is not None and self.long_prompt is not None and prompt > self.long_prompt:
            rates = self.long_rates
        total = sum(getattr(usage, field.name) * getattr(rates, field.name) for field in fields(Rates))
        return float(total) / 1e6 * (self.batch_discount if is_batch else 1.0)

    def most(self, request: Request, *, is_batch: bool) -> float:
        """Dollars that one request can cost at most: its whole prompt at the dearest rate, and all of max_tokens."""
        prompt = sum(len(text.encode()) for text in (request.system, request.shared, request.task))
        tokens = prompt // _BYTES_PER_TOKEN + len(json.dumps(request.schema)) // _BYTES_PER_TOKEN
        written = Usage(cache_write=tokens, output=request.max_tokens)
        plain = Usage(input=tokens, output=request.max_tokens)
        return max(self.cost(usage, is_batch=is_batch) for usage in (written, plain))


def load_prices(model: str, path: Path | None = None) -> Prices | None:
    """The prices of a model; None if the table does not have it.

    Args:
        model: as the provider calls it; dated snapshots (``NAME-20261101``) have the price of NAME.
        path: a JSON file in the form of models.json, instead of the table of this package.

    Raises:
        ConfigError: the file cannot be read as such a table.
    """
    if path is None:
        text = resources.files(__package__).joinpath("models.json").read_text(encoding="utf-8")
    else:
        text = path.read_text(encoding="utf-8")
    try:
        table = json.loads(text)
        name = next((name for name in (model, model.rpartition("-")[0]) if name in table["models"]), None)
        return None if name is None else _prices(table["models"][name], table)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"--prices {path}: {type(error).__name__}: {error}; expected the form of {__package__}/models.json: "
            '{"dated": ..., "batch_discount": 0.5, "models": {NAME: {"input": ..., "output": ..., "cache_write": ..., '
            '"cache_read": ...}}}'
        ) from error


def _prices(row: Mapping[str, Any], table: Mapping[str, Any]) -> Prices:
    above = row.get("above")
    return Prices(
        _rates(row),
        float(table["batch_discount"]),
        str(table["dated"]),
        int(above["prompt_tokens"]) if above else None,
        _rates(above) if above else None,
    )


def _rates(row: Mapping[str, Any]) -> Rates:
    values = {field.name: float(row[field.name]) for field in fields(Rates)}
    if min(values.values()) < 0:
        raise ValueError(f"a price is negative: {values}")
    return Rates(**values)


class BudgetReached(Exception):
    """The next request could take the run beyond its limit."""


class Budget:
    """Keeps what is spent below a limit, also while requests are under way.

    Before a request is sent, the most that it can cost is set aside; when its answer is there, what it did cost takes
    that place. So the limit holds whatever the answers are, and the run ends within one request of it.

    Args:
        limit: dollars; None for no limit.
        spent: dollars that earlier runs on the same folder have spent.
    """

    def __init__(self, limit: float | None, spent: float = 0.0) -> None:
        self.limit = limit
        self.spent = spent
        self._reserved = 0.0
        self._changed = asyncio.Condition()

    def fits(self, amount: float) -> bool:
        """Whether this much more can be spent, with all that is under way."""
        return self.limit is None or self.spent + self._reserved + amount <= self.limit

    async def reserve(self, amount: float) -> None:
        """Set an amount aside; waits for requests under way if it does not fit now.

        Raises:
            BudgetReached: it does not fit, and nothing is under way that could turn out cheaper.
        """
        async with self._changed:
            while not self.fits(amount):
                if self._reserved <= 0:
                    raise BudgetReached
                await self._changed.wait()
            self._reserved += amount

    async def settle(self, reserved: float, cost: float) -> None:
        """Replace what was set aside by what it cost."""
        async with self._changed:
            # Rounding must not leave a trace of what is no longer under way.
            self._reserved = max(0.0, self._reserved - reserved) if self._reserved - reserved > 1e-9 else 0.0
            self.spent += cost
            self._changed.notify_all()
