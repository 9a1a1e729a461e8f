"""A whole evaluation, and the comparison of two: what tools/evaluate.py does."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.evaluation.backends import Backend, EngineBackend, ServerBackend
from megatron_multiverse.evaluation.compare import Comparison, compare_runs
from megatron_multiverse.evaluation.config import EvaluateConfig
from megatron_multiverse.evaluation.report import write_comparison, write_report
from megatron_multiverse.evaluation.samples import SAMPLES, Job, Sample, SampleLog, make_jobs, read_samples
from megatron_multiverse.evaluation.scores import Score, Setting, score_settings
from megatron_multiverse.evaluation.tasks import load_problems
from megatron_multiverse.locked_folder import RECORD, LockedFolder
from megatron_multiverse.progress import PLAIN_LINE_EVERY_S

logger = logging.getLogger(__name__)

_FORMAT = 1
_IN_COMMON = ("chat", "device", "dtype", "quantization")
_THEN = ", then "
"""Between the devices, or the weights, of a run that went on with others."""


@dataclass(frozen=True)
class Evaluated:
    """What a run came to."""

    scores: dict[Setting, Score]
    missing: int
    """Answers that could not be had; the same command asks for them again."""
    first_error: str = ""
    """Why the first of them is missing."""


def evaluate(config: EvaluateConfig) -> Evaluated:
    """Ask for all answers that the run does not have yet, grade them, and write the report.

    Call it in the main thread, which the grader needs.

    Raises:
        MultiverseError: bad options or data, no model, or a server that answers no more. Finished answers are kept.
    """
    sources = config.sources()
    problems = [problem for task in config.tasks for problem in load_problems(task, sources.get(task), config.limit)]
    jobs = make_jobs(problems, config.thinking, config.budgets, config.num_seeds)
    backend: Backend = EngineBackend(config) if config.load is not None else ServerBackend(config)
    settings = {
        "format": _FORMAT,
        "model": backend.name,
        "chat": config.chat,
        "sequential": config.sequential,
        "draw": dict(vars(config.draw)),
        **backend.settings,
    }
    weights = now = settings.pop("weights", None)
    if config.url:
        weights = _recorded_weights(config, now)
    if weights is not None:
        settings["weights"] = weights
    remarks = {"device": backend.device, "later_weights": []}
    with LockedFolder(config.output, settings, "an evaluation", remarks) as folder:
        log = SampleLog(config.output / SAMPLES)
        log.hold_against(jobs)
        begin = partial(_remark_origin, folder, backend.device, now, weights, bool(log.samples))
        errors = _answer(backend, [job for job in jobs if job.key not in log.samples], log, config.concurrency, begin)
        chosen = [log.samples[job.key] for job in jobs if job.key in log.samples]
        if not chosen:
            raise DataError(f"no answer could be had; the first one failed because {errors[0]}")
        scores = score_settings(chosen)
        asked = {"tasks": config.tasks, "problems": len(problems), "seeds": config.num_seeds}
        where = {"date": time.strftime("%Y-%m-%d"), "device": folder.remarks["device"] or "unknown"}
        facts = {**settings, **asked, **where}
        if weights is not None:
            facts["weights"] = _THEN.join([weights, *(folder.remarks["later_weights"] or [])])
        del facts["format"]  # of the folder, which tells a reader nothing
        write_report(config.output, {**facts, "missing answers": len(errors)}, scores, chosen)
    return Evaluated(scores, len(errors), errors[0] if errors else "")


def _recorded_weights(config: EvaluateConfig, now: str | None) -> str | None:
    """What run.json is to say of the weights: those that the first answers in the folder are of.

    Args:
        config: the run.
        now: a hash of the weights that the servers have; None if they tell none.

    Returns:
        `now` for a new run; else what it recorded, None if it was not told.

    Raises:
        ConfigError: the answers in the folder are of other weights.
    """
    answers = config.output / SAMPLES
    if not ((config.output / RECORD).is_file() and answers.is_file() and answers.stat().st_size):
        return now
    before = _settings(config.output).get("weights")
    if before is not None and now is None:
        logger.warning("%s: the server does not tell whether its weights are still those of the answers", config.output)
    elif before not in (None, now):
        told = f"--output {config.output} holds answers of other weights ({before}) than the server has now ({now})"
        if not config.allow_other_weights:
            raise ConfigError(
                f"{told}: serve the earlier ones, choose a new folder, or mix them with --allow-other-weights true"
            )
        logger.warning("%s: their scores are put together, as --allow-other-weights says", told)
    return str(before) if before is not None else None


def _remark_origin(folder: LockedFolder, device: str, weights: str | None, recorded: str | None, goes_on: bool) -> None:
    """Let run.json tell what the answers from now on are made by, beside what the earlier ones were.

    Args:
        folder: of the run.
        device: that of the answers to come.
        weights: a hash of theirs; None if that is not told.
        recorded: that of the first ones.
        goes_on: whether there are earlier answers.
    """
    devices = (folder.remarks["device"] or "unknown") if goes_on else device
    later = folder.remarks["later_weights"] or []
    if device not in devices.split(_THEN):
        logger.warning(
            "%s holds answers made on %s, further ones are made on %s: seconds in its report are of both",
            *(folder.path, devices, device),
        )
        devices = f"{devices}{_THEN}{device}"
    if None not in (weights, recorded) and weights not in (recorded, *later):
        later = [*later, weights]
    folder.remark(device=devices, later_weights=later)


def _answer(
    backend: Backend, jobs: list[Job], log: SampleLog, concurrency: int, begin: Callable[[], None]
) -> list[str]:
    """Answer and grade jobs; `begin` is called before the first answer is kept. Returns why answers are missing."""
    from tqdm import tqdm

    errors: list[str] = []
    if not jobs:
        return errors
    if log.samples:
        logger.info("%d answers are there already, %d are asked for", len(log.samples), len(jobs))
    right = done = kept = 0
    started = printed = time.monotonic()
    with tqdm(total=len(jobs), unit="answer", disable=None, desc="evaluating") as bar:
        for job, outcome in backend.answers(jobs):
            if isinstance(outcome, Exception):
                errors.append(str(outcome))
            else:
                answer, correct = job.problem.grade(outcome.text)
                if not kept:
                    begin()
                kept += 1
                log.append(_sample(job, vars(outcome), answer, correct, concurrency))
                right += correct
            done += 1
            bar.set_postfix_str(f"{right} right, {len(errors)} missing", refresh=False)
            bar.update()
            now = time.monotonic()
            if bar.disable and now - printed >= PLAIN_LINE_EVERY_S:
                printed = now
                eta = (len(jobs) - done) * (now - started) / done
                logger.info(
                    "%d of %d answers: %d right, %d missing, ETA %.0f s", done, len(jobs), right, len(errors), eta
                )
    return errors


def _sample(job: Job, answered: dict[str, object], answer: str | None, correct: bool, concurrency: int) -> Sample:
    return Sample(
        **answered,  # type: ignore[arg-type]
        **job.key._asdict(),
        concurrency=concurrency,
        gold=job.problem.gold,
        answer=answer,
        correct=correct,
        prompt=job.prompt,
    )


def compare(config: EvaluateConfig) -> list[Comparison]:
    """Compare the two runs of `config.compare` and write comparison.md, .json and .png into `config.output`.

    Raises:
        ConfigError: the runs share nothing.
        DataError: a run has no readable samples.
    """
    first, second = (list(read_samples(Path(run) / SAMPLES)) for run in config.compare)
    comparisons = compare_runs(first, second)
    notes = differences(*(_settings(run) for run in config.compare))
    for note in notes:
        logger.warning("%s", note)
    write_comparison(config.output, config.compare, comparisons, notes)
    return comparisons


def _settings(run: Path) -> dict[str, Any]:
    """What a run was made with, as its run.json says; nothing where that is missing."""
    file = run / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What two runs that are compared were made with and should have in common, in words.

    Args:
        first: settings of one run, as its run.json has them.
        second: those of the other. What only one of them tells is not compared.
    """
    drawn = [settings.get("draw", {}) for settings in (first, second)]
    pairs = [(name, drawn[0][name], drawn[1][name]) for name in drawn[0].keys() & drawn[1].keys()]
    pairs += [(name, first[name], second[name]) for name in _IN_COMMON if name in first and name in second]
    return [
        f"The runs were made with another {name} ({one} and {other}): what differs may come from that."
        for name, one, other in sorted(pairs)
        if one != other and "unknown" not in (one, other)
    ]
