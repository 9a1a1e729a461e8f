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
from megatron_multiverse.curation.checkers import Checkers
from megatron_multiverse.curation.config import CurateConfig
from megatron_multiverse.curation.conversation import Conversation
from megatron_multiverse.curation.desk import Desk, End
from megatron_multiverse.curation.estimate import Estimate, estimate_run
from megatron_multiverse.curation.inputs import ChainColumns, Sample, choose_columns, read_samples
from megatron_multiverse.curation.live import LiveRunner, Spending
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
    unanswered: str = ""
    """Why the first of the samples that the provider gave no answer to got none, after several tries; empty if there
    are no such samples. They count as set aside with the code provider, and the next start takes them up again."""


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
    source = open_source(config.input, split=config.split)
    columns = choose_columns(source, config.json_keys)
    prices = _prices(config)
    rules = _rules(config)
    if config.estimate:
        return asyncio.run(_estimate(config, source, columns, prices, rules))
    desk = Desk(config.output, rules, columns, prices, _made_by(config, rules))
    # The processes come first, so that they do not hold the lock of the folder.
    with (
        Checkers(desk, 0 if config.batch else config.workers) as checkers,
        RunFolder(config.output, _settings(config, rules)) as folder,
    ):
        run = _Run(config, source, desk, checkers, folder)
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
        desk: Desk,
        checkers: Checkers,
        folder: RunFolder,
    ) -> None:
        self.config = config
        self.source = source
        self.desk = desk
        self.checkers = checkers
        self.folder = folder
        self.unfinished: dict[str, dict[str, Any]] = {}
        """Samples that this start had to leave: the provider failed. The next start takes them up again."""
        self.progress: SampleProgress | None = None
        self.counts = {"passed": 0, "set_aside": 0}

    async def go(self, confirm: Callable[[str], bool]) -> CurateResult:
        provider = make_provider(self.config)
        try:
            if open_count := sum(1 for _ in self._open_samples()):
                await self._confirm(provider, open_count, confirm)
            stopped = await self._drive(provider)
        finally:
            await provider.close()
            # Also after an error: what has been finished is worth a report.
            priced = self.config.dry_run or self.desk.prices is not None
            tally = write_report(
                self._outcomes(), self.config, self.folder.path, provider.label, self.desk.rules, is_priced=priced
            )
        return CurateResult(tally, stopped, next((entry["reason"] for entry in self.unfinished.values()), ""))

    def _samples(self) -> Iterator[Sample]:
        return read_samples(self.source, self.desk.columns, self.config.limit)

    def _is_open(self, sample: Sample) -> bool:
        outcome = self.folder.sample(sample.name).outcome()
        return outcome is None or (self.config.retry_set_aside and "row" not in outcome)

    async def _confirm(self, provider: Provider, count: int, confirm: Callable[[str], bool]) -> None:
        if self.config.yes or self.config.dry_run:
            return
        estimate = await estimate_run(self._open_samples(), provider, self.desk.prices, self.desk.rules)
        if not confirm(estimate.text(is_batch=self.config.batch, is_cached=self.config.cache)):
            raise ConfigError(
                f"not confirmed: nothing was asked ({count} samples); --yes goes on without this question"
            )

    async def _drive(self, provider: Provider) -> str | None:
        spending = Spending(self.desk.prices, Budget(self.config.max_cost_usd), is_batch=self.config.batch)
        on_end = partial(self._on_end, spending)
        if self.config.batch:
            assert isinstance(provider, BatchProvider)

            def finish(talk: Conversation) -> None:
                on_end(talk.sample, self.desk.finish(talk))

            batches = BatchRunner(provider, spending, self.folder, self.config.poll_interval, finish)
            await batches.collect()
            with self._progress(spending):
                await batches.run(self.desk.open(sample) for sample in self._open_samples())
            return batches.stopped
        live = LiveRunner(provider, spending, self.config.concurrency, self.checkers, on_end)
        with self._progress(spending), _gentle_stop(live):
            await live.run(self._open_samples())
        return live.stopped

    @contextlib.contextmanager
    def _progress(self, spending: Spending) -> Iterator[None]:
        open_count = self._count_finished(spending)
        self.progress = SampleProgress(sum(self.counts.values()) + open_count, sum(self.counts.values()))
        try:
            yield
        finally:
            self.progress.close()

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

    def _open_samples(self) -> Iterator[Sample]:
        return (sample for sample in self._samples() if self._is_open(sample))

    def _on_end(self, spending: Spending, sample: Sample, end: End) -> None:
        self.counts["passed" if end.has_passed else "set_aside"] += 1
        if end.unfinished is not None:
            self.unfinished[sample.name] = end.unfinished
        if self.progress is not None:
            spent = spending.budget.spent if spending.prices is not None else None
            self.progress.show(self.counts["passed"], self.counts["set_aside"], spent)

    def _outcomes(self) -> Iterator[tuple[Sample, dict[str, Any] | None]]:
        for sample in self._samples():
            yield sample, self.folder.sample(sample.name).outcome() or self.unfinished.get(sample.name)


def _made_by(config: CurateConfig, rules: Rules) -> dict[str, Any]:
    made_by = "rules, for a dry run: not for training" if config.dry_run else config.model
    return {"model": made_by, "prompts": prompt_hash(), "tokens": rules.counter.label}


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
def _gentle_stop(runner: LiveRunner) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM lets answers under way arrive; the second one ends the run at once.

    Batches need none of it: one that is under way is found again.
    """
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
