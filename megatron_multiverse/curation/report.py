"""What a run has made: rows.jsonl, set_aside.jsonl, report.json, report.md, report.png and views/*.html."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_multiverse.curation.config import CurateConfig
from megatron_multiverse.curation.exchange import Usage
from megatron_multiverse.curation.inputs import Sample
from megatron_multiverse.curation.plan import KINDS
from megatron_multiverse.curation.plots import draw_report
from megatron_multiverse.curation.rules import Rules
from megatron_multiverse.curation.viewer import write_view
from megatron_multiverse.files import flush, naming, write_json_atomic, write_text_atomic

Outcome = dict[str, Any]


@dataclass
class Tally:
    """Counts over the samples of a run. Lengths are in tokens of the counter of the run."""

    passed: int = 0
    open: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    """By code."""
    dollars: float = 0.0
    is_priced: bool = True
    """Whether the prices were known; dollars are 0 without."""
    usage: dict[str, Usage] = field(default_factory=dict)
    """By stage."""
    questions: Counter[str] = field(default_factory=Counter)
    """By stage."""
    problems: Counter[str] = field(default_factory=Counter)
    """Answers that could not be used, by stage."""
    with_kind: Counter[str] = field(default_factory=Counter)
    """Samples with at least one block of a kind."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Blocks by kind."""
    depths: Counter[int] = field(default_factory=Counter)
    """Samples by their deepest nesting."""
    paths: Counter[int] = field(default_factory=Counter)
    """Blocks by their number of paths."""
    flattened: Counter[str] = field(default_factory=Counter)
    """Blocks that are text again, by reason."""
    groups: Counter[str] = field(default_factory=Counter)
    """Groups of steps by how they could be arranged."""
    signs: int = 0
    """Signs of dependence that were only reported."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Sums over samples: num_tokens, critical_tokens, path_tokens, plain_tokens, critical_tokens_before."""
    ratios: list[tuple[float, float]] = field(default_factory=list)
    """Critical path / plain text of each sample, before and after the gate."""
    parallel: list[float] = field(default_factory=list)
    """num_parallel of each sample."""
    distances: list[float] = field(default_factory=list)

    def add(self, outcome: Outcome | None) -> None:
        """Count one sample."""
        if outcome is None:
            self.open += 1
            return
        curation = outcome.get("curation", outcome)
        self.dollars += curation["dollars"]
        for entry in curation["history"]:
            stage = entry["stage"]
            self.questions[stage] += 1
            self.problems[stage] += "problem" in entry
            self.usage[stage] = self.usage.get(stage, Usage()) + Usage(**entry.get("usage", {}))
        if "row" in outcome:
            self.passed += 1
            self._add_structure(curation)
        else:
            self.set_aside[outcome["code"]] += 1

    def _add_structure(self, curation: dict[str, Any]) -> None:
        before, after = curation["before_gate"], curation["statistics"]
        kinds = Counter(block["kind"] for block in curation["blocks"])
        self.kinds += kinds
        self.with_kind.update(kinds.keys())
        self.depths[after["depth"]] += 1
        self.paths.update(block["paths"] for block in curation["blocks"])
        self.flattened.update(curation["flattened"])
        self.groups.update(curation["groups"])
        self.signs += len(curation["signs_of_dependence"])
        plain = curation["plain_tokens"]
        self.tokens.update({name: after[name] for name in ("num_tokens", "critical_tokens", "path_tokens")})
        self.tokens.update({"plain_tokens": plain, "critical_tokens_before": before["critical_tokens"]})
        self.ratios.append((before["critical_tokens"] / plain, after["critical_tokens"] / plain))
        self.parallel.append(after["num_tokens"] / after["critical_tokens"])
        self.distances.append(curation["distance"])

    def share(self, above: str, below: str) -> float:
        """The quotient of two sums of `tokens`."""
        return self.tokens[above] / max(self.tokens[below], 1)

    def lines(self) -> list[str]:
        """The result in a few lines."""
        codes = ", ".join(f"{count} {code}" for code, count in self.set_aside.most_common())
        return [
            f"samples     {self.passed} passed, {self.set_aside.total()} set aside{f' ({codes})' if codes else ''}, "
            f"{self.open} left",
            f"blocks      {self.kinds.total()} kept, {self.flattened.total()} turned back into text",
            f"steps       {self.share('critical_tokens', 'plain_tokens'):.3f} of the plain text's "
            f"({self.share('critical_tokens_before', 'plain_tokens'):.3f} before blocks without gain were flattened)",
            f"cost        ${self.dollars:.2f}"
            if self.is_priced
            else "cost        not counted: the prices of the model are not known (--prices adds them)",
        ]


def write_report(
    outcomes: Iterable[tuple[Sample, Outcome | None]],
    config: CurateConfig,
    folder: Path,
    made_by: str,
    rules: Rules,
    *,
    is_priced: bool = True,
) -> Tally:
    """Write all outputs of a run.

    Args:
        outcomes: every sample of the input with how it ended; None if it has not.
        config: the options.
        folder: the folder of the run.
        made_by: the label of the provider.
        rules: of the run.
        is_priced: whether the prices of the model are known.
    """
    tally = Tally(is_priced=is_priced)
    with ExitStack() as stack:
        rows = stack.enter_context(_whole_file(folder / "rows.jsonl"))
        aside = stack.enter_context(_whole_file(folder / "set_aside.jsonl"))
        for sample, outcome in outcomes:
            tally.add(outcome)
            if outcome is None:
                continue
            if "row" in outcome:
                row = {**sample.fields, **outcome["row"], "curation": outcome["curation"]}
                rows.write(json.dumps(row, default=str) + "\n")
                if tally.passed <= config.views:
                    (folder / "views").mkdir(exist_ok=True)
                    write_view(folder / "views" / f"{sample.name}.html", sample, outcome, made_by)
            else:
                aside.write(json.dumps({"row": sample.row, "name": sample.name, **outcome}) + "\n")
    write_json_atomic(folder / "report.json", _as_json(tally, made_by, rules))
    if tally.passed:
        draw_report(tally.ratios, tally.parallel, tally.kinds, tally.paths, rules.counter.label, folder / "report.png")
    write_text_atomic(folder / "report.md", _as_markdown(tally, made_by, rules, config))
    return tally


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[str]]:
    """A file that replaces the old one once all is written."""
    partial = path.with_name(f"{path.name}.partial")
    with naming(partial), open(partial, "w", encoding="utf-8") as stream:
        yield stream
    flush(partial)
    os.replace(partial, path)


def _as_json(tally: Tally, made_by: str, rules: Rules) -> dict[str, Any]:
    return {
        "made_by": made_by,
        "tokens_counted": rules.counter.label,
        "passed": tally.passed,
        "set_aside": dict(tally.set_aside),
        "left": tally.open,
        "dollars": round(tally.dollars, 4) if tally.is_priced else None,
        "usage": {stage: vars(usage) for stage, usage in tally.usage.items()},
        "questions": dict(tally.questions),
        "unusable_answers": dict(+tally.problems),
        "blocks_by_kind": dict(tally.kinds),
        "samples_with_kind": dict(tally.with_kind),
        "samples_by_depth": dict(sorted(tally.depths.items())),
        "blocks_by_paths": dict(sorted(tally.paths.items())),
        "flattened": dict(+tally.flattened),
        "groups": dict(tally.groups),
        "signs_of_dependence": tally.signs,
        "tokens": dict(tally.tokens),
        "num_parallel": tally.share("num_tokens", "critical_tokens"),
        "in_path_share": tally.share("path_tokens", "num_tokens"),
        "critical_to_plain": tally.share("critical_tokens", "plain_tokens"),
        "critical_to_plain_before_gate": tally.share("critical_tokens_before", "plain_tokens"),
        "mean_distance": sum(tally.distances) / max(len(tally.distances), 1),
        "max_distance": max(tally.distances, default=0.0),
    }


def _as_markdown(tally: Tally, made_by: str, rules: Rules, config: CurateConfig) -> str:
    parts = [f"# Curation by {made_by}", "", *(f"- {line}" for line in tally.lines())]
    parts += [f"- lengths are in {rules.counter.label}", ""]
    if config.dry_run:
        parts.insert(1, "\n**A dry run: simple rules stood in for a model. Not for training.**")
    if tally.passed:
        parts += ["![net gain, parallelism and blocks](report.png)", "", *_structure(tally)]
    parts += ["## Questions", "", "| stage | asked | unusable | input | from cache | output | of it thinking |"]
    parts += ["|---|---|---|---|---|---|---|"]
    for stage, asked in tally.questions.items():
        used = tally.usage[stage]
        read = f"{used.input + used.cache_write:,} | {used.cache_read:,} | {used.output:,} | {used.thinking:,}"
        parts.append(f"| {stage} | {asked} | {tally.problems[stage]} | {read} |")
    parts += ["", "Why samples were set aside stands in set_aside.jsonl, with all that was asked and answered.", ""]
    return "\n".join(parts)


def _structure(tally: Tally) -> list[str]:
    n = max(tally.passed, 1)
    any_kind = 100 * (tally.passed - tally.depths[0]) / n
    lines = ["## Kinds of blocks", "", "| kind | all paths needed | blocks | per sample | samples with one |"]
    lines += ["|---|---|---|---|---|"]
    for kind, way in KINDS.items():
        needed = "yes (AND, collective)" if way == "collective" else "no (OR, selective)"
        count, share = tally.kinds[kind], 100 * tally.with_kind[kind] / n
        lines.append(f"| {kind.replace('_', ' ')} | {needed} | {count} | {count / n:.2f} | {share:.1f} % |")
    lines.append(f"| any | | {tally.kinds.total()} | {tally.kinds.total() / n:.2f} | {any_kind:.1f} % |")
    blocks = max(tally.kinds.total(), 1)
    per_block = sum(count * paths for paths, count in tally.paths.items()) / blocks
    lines += ["", "## Structure", "", "| | |", "|---|---|"]
    lines += [
        f"| tokens / critical path (# parallel) | {tally.share('num_tokens', 'critical_tokens'):.3f} |",
        f"| critical path / plain text, blocks without gain flattened | "
        f"{tally.share('critical_tokens', 'plain_tokens'):.3f} |",
        f"| the same before | {tally.share('critical_tokens_before', 'plain_tokens'):.3f} |",
        f"| share of tokens in paths | {tally.share('path_tokens', 'num_tokens'):.3f} |",
        f"| paths per block | {per_block:.2f} |",
        f"| samples by depth | {_counts(tally.depths)} |",
        f"| blocks turned back into text | {_counts(+tally.flattened)} |",
        f"| groups of steps | {_counts(tally.groups)} |",
        f"| distance to the original, mean and largest | {sum(tally.distances) / n:.3f}, {max(tally.distances):.3f} |",
        f"| signs of dependence left in rows | {tally.signs} |",
        "",
    ]
    return lines


def _counts(counts: Counter[Any]) -> str:
    return ", ".join(f"{key}: {count}" for key, count in sorted(counts.items())) or "none"
