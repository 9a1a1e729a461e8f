"""What a run will cost, before it starts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_multiverse.curation.chain import cut_chain
from megatron_multiverse.curation.exchange import Effort, Request, Stage, Usage
from megatron_multiverse.curation.inputs import Sample
from megatron_multiverse.curation.plan import Step
from megatron_multiverse.curation.prices import Prices
from megatron_multiverse.curation.prompts import fill
from megatron_multiverse.curation.providers.protocol import Provider
from megatron_multiverse.curation.questions import Questions
from megatron_multiverse.curation.rules import Rules

_COUNTED_SAMPLES = 12
"""So many prompts are counted by the provider; the others are taken to have as many tokens per character."""
_CHARACTERS_PER_TOKEN = 2.8
"""Of mathematical text with line numbers, where the provider cannot count."""
_THINKING: dict[Effort, int] = {"low": 1_000, "medium": 4_000, "high": 8_000, "xhigh": 16_000, "max": 32_000}
"""Tokens of thinking per answer. It is the largest part of the cost and the least certain one: a run of a few samples
tells better."""
_ATTEMPTS: dict[Stage, float] = {"outline": 1.1, "groups": 1.1, "rewrite": 1.4}
"""Questions per sample and stage; above 1 for answers that fail a check."""
# Shares of a chain, measured on 14 trajectories of Multiverse-1K: characters of the outline and of the groups as JSON,
# of the blocks as they are sent to be rewritten, and of what comes back.
_OUTLINE_SHARE, _GROUPS_SHARE, _BLOCKS_SHARE, _REWRITTEN_SHARE = 0.14, 0.04, 0.50, 0.55


@dataclass(frozen=True)
class Estimate:
    """Tokens of a run by stage, without the prompt cache, and their prices.

    Attributes:
        samples: number of chains.
        usage: tokens by stage.
        cached_usage: the same with the chain written to the cache by stage 1 and read by stage 2.
        prices: None if they are not known.
        counted: how prompts were counted.
    """

    samples: int
    usage: dict[Stage, Usage]
    cached_usage: dict[Stage, Usage]
    prices: Prices | None
    counted: str

    def dollars(self, *, is_batch: bool, is_cached: bool, stage: Stage | None = None) -> float:
        """The cost of one stage, or of all."""
        if self.prices is None:
            return 0.0
        usage = self.cached_usage if is_cached else self.usage
        chosen = [usage[stage]] if stage is not None else list(usage.values())
        # Rates that depend on the length of a prompt are those of a single request.
        return sum(self.prices.cost(_divided(part, self.samples), is_batch=is_batch) * self.samples for part in chosen)

    def text(self, *, is_batch: bool, is_cached: bool) -> str:
        """The estimate as a table.

        Args:
            is_batch: whether the run as it was asked for uses batches.
            is_cached: whether it uses the prompt cache.
        """
        lines = [f"{self.samples} chains; prompts {self.counted}"]
        lines.append(f"{'stage':<10}{'input tokens':>16}{'output tokens':>16}{'live':>12}{'batch':>12}")
        for stage, used in self.usage.items():
            costs = [self.dollars(is_batch=batch, is_cached=is_cached, stage=stage) for batch in (False, True)]
            lines.append(f"{stage:<10}{used.input:>16,}{used.output:>16,}{self._shown(costs)}")
        for cached in (False, True):
            costs = [self.dollars(is_batch=batch, is_cached=cached) for batch in (False, True)]
            name = "all, with prompt cache" if cached else "all, without cache"
            lines.append(f"{name:<42}{self._shown(costs)}")
        if self.prices is None:
            lines.append("The prices of this model are not known; --prices adds them.")
        else:
            chosen = self.dollars(is_batch=is_batch, is_cached=is_cached)
            how = ("batch" if is_batch else "live") + (", with prompt cache" if is_cached else ", without cache")
            lines.append(f"This run ({how}): about ${chosen:,.2f} (prices of {self.prices.dated}).")
        lines.append("Thinking is billed as output and is a guess here; a run with --limit 5 tells what it really is.")
        return "\n".join(lines)

    def _shown(self, costs: list[float]) -> str:
        return "".join(f"{'-' if self.prices is None else f'{cost:,.2f}':>12}" for cost in costs)


async def estimate_run(samples: Iterable[Sample], provider: Provider, prices: Prices | None, rules: Rules) -> Estimate:
    """Estimate the cost of a run.

    Args:
        samples: the chains.
        provider: counts the tokens of some prompts, if it can.
        prices: of the model.
        rules: of the run.
    """
    lengths: list[int] = []
    requests: list[Request] = []
    for sample in samples:
        if sample.problem:
            continue
        chain = cut_chain(sample.chain)
        if len(requests) < _COUNTED_SAMPLES:
            requests.append(Questions(chain, rules.effort, is_cached=False).outline(1, None))
        lengths.append(len(chain.numbered()))
    per_token, counted = await _characters_per_token(requests, provider)
    overhead = {stage: len(fill("system")) + _task_characters(stage) for stage in _ATTEMPTS}
    characters, count = sum(lengths), len(lengths)
    sent = {"outline": 0.0, "groups": _OUTLINE_SHARE / 2, "rewrite": _BLOCKS_SHARE}
    answered = {"outline": _OUTLINE_SHARE, "groups": _GROUPS_SHARE, "rewrite": _REWRITTEN_SHARE}
    usage: dict[Stage, Usage] = {}
    cached: dict[Stage, Usage] = {}
    for stage, attempts in _ATTEMPTS.items():
        shared = attempts * (characters + count * len(fill("shared", numbered=""))) / per_token
        task = attempts * (count * overhead[stage] + sent[stage] * characters) / per_token
        output = attempts * (count * _THINKING[rules.effort] + answered[stage] * characters / per_token)
        usage[stage] = Usage(input=round(shared + task), output=round(output))
        cached[stage] = replace(usage[stage], input=round(task))
        if stage == "rewrite":  # a request without a schema shares no cache with those that have one
            cached[stage] = usage[stage]
        elif stage == "outline":
            cached[stage] = replace(
                cached[stage], cache_write=round(shared / attempts), cache_read=round(shared - shared / attempts)
            )
        else:
            cached[stage] = replace(cached[stage], cache_read=round(shared))
    return Estimate(count, usage, cached, prices, counted)


async def _characters_per_token(requests: list[Request], provider: Provider) -> tuple[float, str]:
    counts = await asyncio.gather(*(provider.count_tokens(request) for request in requests))
    tokens = [count for count in counts if count is not None]
    if not tokens:
        return _CHARACTERS_PER_TOKEN, f"taken to have {_CHARACTERS_PER_TOKEN} characters per token"
    characters = sum(len(part) for r in requests for part in (r.system, r.shared, r.task))
    return characters / sum(tokens), f"counted by the provider in {len(tokens)} samples"


def _task_characters(stage: Stage) -> int:
    empty = (Step("1", "", 1, 1),)
    questions = Questions(cut_chain("x"), "medium", is_cached=False)
    if stage == "outline":
        return len(questions.outline(1, None).task)
    return (
        len(questions.groups(empty, 1, None).task) if stage == "groups" else len(fill("rewrite", blocks="", count=""))
    )


def _divided(usage: Usage, count: int) -> Usage:
    return Usage(
        *(round(value / max(count, 1)) for value in (usage.input, usage.cache_write, usage.cache_read, usage.output))
    )
