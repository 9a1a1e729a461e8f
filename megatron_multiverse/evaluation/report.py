"""What a person reads of a run or of a comparison: report.md, report.json, and report.png beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_multiverse.evaluation.compare import RESAMPLES, Comparison, Interval
from megatron_multiverse.evaluation.plots import draw_comparison, draw_scores
from megatron_multiverse.evaluation.samples import Sample
from megatron_multiverse.evaluation.scores import Score, Setting
from megatron_multiverse.files import write_json_atomic, write_text_atomic

_COLUMNS = (
    "task", "thinking", "budget", "pass@1 %", "± seeds", "± problems", "# parallel", "acceleration ratio",
    "token latency", "trigger %", "malformed %", "closed %", "cut %", "tokens", "s / answer", "ms / token",
)  # fmt: skip
_LEGEND = """
pass@1 is the mean over problems and seeds, followed by its standard error over seeds and over problems. # parallel is
all tokens over all tokens on longest chains; acceleration ratio is the mean of the same ratio of each answer; token
latency is the mean number of tokens on the longest chain; trigger is the share of answers with a parallel block;
malformed the share that broke the grammar; closed the share of which the engine ended a thought or a path, or refused a
block: as their budget wanted it, or since the model had ended its text there, which is malformed, too; cut the share
that spent their budget. Tokens are means per answer over all branches.
Seconds are the wall clock of an answer while others were under way ({concurrency} at once).
# parallel counts tags and outlines as output: what parallel thinking saves is the wall clock beside a sequential run of
the same tasks (`--compare`).
"""


def write_report(
    folder: Path, facts: Mapping[str, Any], scores: Mapping[Setting, Score], samples: list[Sample]
) -> None:
    """Write the report of a run.

    Args:
        folder: of the run.
        facts: what the run was made with, and how many of its answers are missing.
        scores: of each setting.
        samples: all that are finished; at least one.
    """
    rows = [setting._asdict() | asdict(score) for setting, score in scores.items()]
    write_json_atomic(folder / "report.json", {**facts, "scores": rows})
    concurrency = sorted({number for score in scores.values() for number in score.concurrency})
    lines = ["# Evaluation", "", *(f"- {name}: {_fact(value)}" for name, value in facts.items()), ""]
    lines += _table(_COLUMNS, [_cells(setting, score) for setting, score in scores.items()])
    lines.append(_LEGEND.format(concurrency=", ".join(map(str, concurrency))))
    lines += ["![Accuracy, parallelism and length](report.png)", ""]
    write_text_atomic(folder / "report.md", "\n".join(lines))
    draw_scores(scores, samples, folder / "report.png")


def write_comparison(
    folder: Path, runs: Sequence[Path], comparisons: Sequence[Comparison], notes: Sequence[str] = ()
) -> None:
    """Write the report of two runs beside each other into `folder`, which is made if it is missing; `notes` are what
    else a reader has to know."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(run) for run in runs]
    write_json_atomic(
        folder / "comparison.json",
        {"runs": names, "comparisons": [asdict(one) for one in comparisons], "notes": [*notes]},
    )
    columns = (
        "task", "budget", "thinking", "problems", "first %", "second %", "difference (points)", "p",
        "net speed-up (seconds)", "speed-up (longest chain)",
    )  # fmt: skip
    lines = ["# Comparison", "", f"- first: {names[0]}", f"- second: {names[1]}", ""]
    lines += _table(columns, [_comparison_cells(one) for one in comparisons])
    lines += [
        "",
        "Over the problems that both have answered, each the mean of its seeds. In brackets the 95 % interval of "
        f"{RESAMPLES:,} resamples of problems, p how often they show no difference, or one of the other sign "
        "(two-sided). Net speed-up is the mean wall clock of an answer of the first run over that of the second.",
        *(line for one in comparisons for line in _warnings(one)),
        *(f"\n{note}" for note in notes),
        "",
        "![Difference and speed-up](comparison.png)",
        "",
    ]  # fmt: skip
    write_text_atomic(folder / "comparison.md", "\n".join(lines))
    draw_comparison(comparisons, folder / "comparison.png")


def score_lines(scores: Mapping[Setting, Score]) -> list[str]:
    """The report for a terminal: one line for each setting."""
    width = max(len(setting.label) for setting in scores)
    return [
        f"{setting.label:<{width}}  pass@1 {_percent(score.accuracy)} %{_plus_minus(score)}  "
        f"# parallel {score.num_parallel:.2f}  longest chain {score.token_latency:.0f} of {score.tokens:.0f} tokens  "
        f"{score.seconds:.2f} s"
        for setting, score in scores.items()
    ]


def comparison_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """The comparison for a terminal."""
    lines = [
        f"{one.label}: "
        f"{_percent(one.accuracy[0])} % -> {_percent(one.accuracy[1])} % (p {one.p_value:.3f}, {one.problems} "
        f"problems), net speed-up {_shown(one.speedup)}, longest chain {_shown(one.step_speedup)}"
        for one in comparisons
    ]
    return lines + [warning.strip() for one in comparisons for warning in _warnings(one)]


def _plus_minus(score: Score) -> str:
    for error, what in ((score.stderr_seeds, "seeds"), (score.stderr_problems, "problems")):
        if error is not None:
            return f" ± {_percent(error)} over {what}"
    return ""


def _warnings(one: Comparison) -> Iterator[str]:
    if one.unpaired:
        yield f"\n{one.label}: {one.unpaired} problems are in one run only and left out."
    if one.concurrency[0] != one.concurrency[1]:
        yield (
            f"\n{one.label}: the runs had other numbers of answers under way ({one.concurrency[0]} and "
            f"{one.concurrency[1]}), so their seconds do not compare."
        )


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact(part)}" for name, part in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _cells(setting: Setting, score: Score) -> list[str]:
    return [
        setting.task,
        setting.thinking,
        "none" if setting.budget is None else str(setting.budget),
        _percent(score.accuracy),
        _percent(score.stderr_seeds),
        _percent(score.stderr_problems),
        f"{score.num_parallel:.3f}",
        f"{score.acceleration_ratio:.3f}",
        f"{score.token_latency:.1f}",
        _percent(score.trigger_ratio),
        _percent(score.malformed),
        _percent(score.closed),
        _percent(score.truncated),
        f"{score.tokens:.1f}",
        f"{score.seconds:.3f}",
        f"{1000 * score.seconds_per_token:.2f}",
    ]


def _comparison_cells(one: Comparison) -> list[str]:
    points = Interval(*(100 * value for value in vars(one.difference).values()))
    return [
        one.task,
        "none" if one.budget is None else str(one.budget),
        f"{one.first} / {one.second}",
        str(one.problems),
        _percent(one.accuracy[0]),
        _percent(one.accuracy[1]),
        _shown(points),
        f"{one.p_value:.4f}",
        _shown(one.speedup),
        _shown(one.step_speedup),
    ]


def _shown(interval: Interval) -> str:
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
