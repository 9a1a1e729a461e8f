"""The whole command: what tools/curate_data.py runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_multiverse.curation.batches import BatchRunner
from megatron_multiverse.curation.config import CurateConfig
from megatron_multiverse.curation.conversation import Conversation
from megatron_multiverse.curation.estimate import Estimate, estimate_run
from megatron_multiverse.curation.inputs import ChainColumns, Sample, choose_columns, output_columns, read_samples
from megatron_multiverse.curation.live import LiveRunner, Spending
from megatron_multiverse.curation.pipeline import Passed
from megatron_multiverse.curation.prices import Budget, Prices, load_prices
from megatron_multiverse.curation.progress import SampleProgress
from megatron_multiverse.curation.prompts import prompt_hash
from megatron_multiverse.curation.providers.choose import make_provider
from megatron_multiverse.curation.providers.protocol import BatchProvider, Provider
from megatron_multiverse.curation.report import Tally, write_report
from megatron_multiverse.curation.rules import Rules
from megatron_multiverse.curation.run_folder import RunFolder
from megatron_multiverse.curation.token_counts import RoughTokens, TokenCounter, TrainingTokens
from megatron_multiverse.data.sources import Source, open_source
from megatron_multiverse.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CurateResult:
    """What a run did."""

    tally: Tally
    stopped: str | None
    """Why samples are left; None if none are."""


def curate_data(config: CurateConfig, confirm: Callable[[str], bool]) -> CurateResult | Estimate:
    """Run the command.

    Args:
        config: the options.
        confirm: shows the estimated cost and asks whether to go on.

    Returns:
        What was done, or only the estimate if that was asked for.

    Raises:
        ConfigError: an option that cannot work, or no confirmation.
        DataError: another run works in the output folder.
        ProviderError: the provider takes no request; all that was answered has been kept.
    """
    source = open_source(config.inputs, split=config.split)
    columns = choose_columns(source, config.json_keys)
    prices = _prices(config)
    rules = _rules(config)
    if config.estimate:
        return asyncio.run(_estimate(config, source, columns, prices, rules))
    with RunFolder(config.output, _settings(config, rules)) as folder:
        run = _Run(config, source, columns, prices, rules, folder)
        return asyncio.run(run.go(confirm))


async def _estimate(
    config: CurateConfig, source: Source, columns: ChainColumns, prices: Prices | None, rules: Rules
) -> Estimate:
    provider = make_provider(config)
    try:
        samples = read_samples(source, columns, config.limit)
        return await estimate_run(samples, provider, prices, rules)
    finally:
        await provider.close()


class _Run:
    def __init__(
        self,
        config: CurateConfig,
        source: Source,
        columns: ChainColumns,
        prices: Prices | None,
        rules: Rules,
        folder: RunFolder,
    ) -> None:
        self.config = config
        self.source = source
        self.columns = columns
        self.prices = prices
        self.rules = rules
        self.folder = folder
        self.unfinished: dict[str, dict[str, Any]] = {}
        """Samples that this start had to leave: the provider failed. The next start takes them up again."""
        self.progress: SampleProgress | None = None
        self.counts = {"passed": 0, "set_aside": 0}

    async def go(self, confirm: Callable[[str], bool]) -> CurateResult:
        provider = make_provider(self.config)
        try:
            open_samples = [sample.name for sample in self._samples() if self._is_open(sample)]
            if open_samples:
                await self._confirm(provider, len(open_samples), confirm)
            stopped = await self._drive(provider)
        finally:
            await provider.close()
            # Also after an error: what has been finished is worth a report.
            tally = write_report(self._outcomes(), self.config, self.folder.path, provider.label, self.rules)
        return CurateResult(tally, stopped)

    def _samples(self) -> Iterator[Sample]:
        return read_samples(self.source, self.columns, self.config.limit)

    def _is_open(self, sample: Sample) -> bool:
        outcome = self.folder.sample(sample.name).outcome()
        return outcome is None or (self.config.retry_set_aside and "row" not in outcome)

    async def _confirm(self, provider: Provider, count: int, confirm: Callable[[str], bool]) -> None:
        if self.config.yes or self.config.dry_run:
            return
        open_samples = (sample for sample in self._samples() if self._is_open(sample))
        estimate = await estimate_run(open_samples, provider, self.prices, self.rules)
        if not confirm(estimate.text(is_batch=self.config.batch, is_cached=self.config.cache)):
            raise ConfigError(
                f"not confirmed: nothing was asked ({count} samples); --yes goes on without this question"
            )

    async def _drive(self, provider: Provider) -> str | None:
        spending = Spending(self.prices, Budget(self.config.max_cost_usd), is_batch=self.config.batch)
        runner: LiveRunner | BatchRunner
        if self.config.batch:
            assert isinstance(provider, BatchProvider)
            poll_s = self.config.poll_interval
            runner = BatchRunner(provider, spending, self.folder, poll_s, partial(self._finish, spending))
            await runner.collect()
        else:
            runner = LiveRunner(provider, spending, self.config.concurrency, partial(self._finish, spending))
        open_count = self._count_finished(spending)
        self.progress = SampleProgress(sum(self.counts.values()) + open_count, sum(self.counts.values()))
        try:
            with _gentle_stop(runner):
                await runner.run(self._conversations())
        finally:
            self.progress.close()
        return runner.stopped

    def _count_finished(self, spending: Spending) -> int:
        """Count what earlier starts have finished and spent; returns the number of open samples."""
        open_count = 0
        for sample in self._samples():
            state = self.folder.sample(sample.name)
            spending.budget.spent += sum(spending.cost(answer) for answer in state.answers.values())
            if self._is_open(sample):
                open_count += 1
            else:
                self.counts["passed" if "row" in (state.outcome() or {}) else "set_aside"] += 1
        return open_count

    def _conversations(self) -> Iterator[Conversation]:
        for sample in self._samples():
            if self._is_open(sample):
                yield Conversation(sample, self.folder.sample(sample.name), self.rules)

    async def _finish(self, spending: Spending, talk: Conversation) -> None:
        outcome = talk.outcome
        if isinstance(outcome, Passed):
            curation = {**outcome.details, "dollars": self._dollars(talk), **self._made_by()}
            row = output_columns(talk.sample, self.columns, outcome)
            await asyncio.to_thread(talk.state.finish, {"row": row, "curation": curation})
            self.counts["passed"] += 1
        elif outcome is not None:
            entry: dict[str, Any] = {"code": outcome.code, "reason": outcome.reason, "history": outcome.history}
            entry["dollars"] = self._dollars(talk)
            self.counts["set_aside"] += 1
            if outcome.code == "provider":
                self.unfinished[talk.sample.name] = entry
            else:
                await asyncio.to_thread(talk.state.finish, entry)
        if self.progress is not None:
            self.progress.show(self.counts["passed"], self.counts["set_aside"], spending.budget.spent)

    def _dollars(self, talk: Conversation) -> float:
        if self.prices is None:
            return 0.0
        answers = talk.state.answers.values()
        return sum(self.prices.cost(answer.usage, is_batch=answer.is_batch) for answer in answers)

    def _made_by(self) -> dict[str, Any]:
        made_by = "rules, for a dry run: not for training" if self.config.dry_run else self.config.model
        return {"model": made_by, "prompts": prompt_hash(), "tokens": self.rules.counter.label}

    def _outcomes(self) -> Iterator[tuple[Sample, dict[str, Any] | None]]:
        for sample in self._samples():
            yield sample, self.folder.sample(sample.name).outcome() or self.unfinished.get(sample.name)


def _prices(config: CurateConfig) -> Prices | None:
    if config.dry_run:
        return None
    prices = load_prices(config.model, config.prices)
    if prices is None and config.max_cost_usd is not None:
        raise ConfigError(
            f"--max-cost-usd needs the prices of {config.model}, which the table does not have: add them with --prices"
        )
    if prices is None:
        logger.warning("the prices of %s are not known: costs are not counted (add them with --prices)", config.model)
    return prices


def _rules(config: CurateConfig) -> Rules:
    counter: TokenCounter = RoughTokens()
    if config.tokenizer_model:
        from megatron_multiverse.data.tokenizers import build_tokenizer

        tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model)
        counter = TrainingTokens(tokenizer, config.tokenizer_model)
    return Rules(
        counter,
        max_attempts=config.max_attempts,
        max_distance=config.max_distance,
        min_net_gain=config.min_net_gain,
        losing_blocks=config.losing_blocks,
        failed_blocks=config.failed_blocks,
        independence=config.independence,
        effort=config.effort,
        is_cached=config.cache,
    )


def _settings(config: CurateConfig, rules: Rules) -> dict[str, Any]:
    """What a later start on the same folder has to have in common, because rows of one run are made in one way."""
    names = ("provider", "model", "dry_run", "effort", "max_distance", "independence", "min_net_gain", "losing_blocks")
    chosen = {name: getattr(config, name) for name in (*names, "failed_blocks", "cache")}
    return {**chosen, "tokens": rules.counter.label, "prompts": prompt_hash()}


@contextlib.contextmanager
def _gentle_stop(runner: LiveRunner | BatchRunner) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM lets answers under way arrive; the second one ends the run at once."""
    if isinstance(runner, BatchRunner):
        yield  # nothing is lost by ending at once: a batch under way is found again
        return
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        logger.warning(
            "stopping: waiting for the answers that are under way, since they are paid; again to end at once"
        )
        loop.remove_signal_handler(number)
        runner.stop(f"stopped by {number.name}")

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def ask_on_terminal(text: str) -> bool:
    """Show an estimate and ask whether to go on; without a terminal nobody can answer, so the answer is no."""
    print(text)
    if not sys.stdin.isatty():
        return False
    return input("Go on? [y/N] ").strip().lower() in ("y", "yes")
