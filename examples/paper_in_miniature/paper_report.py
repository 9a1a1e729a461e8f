"""Tables and figures of the miniature from results/*.json alone, and the parts of README.md between its marks.

`python examples/paper_in_miniature/paper_report.py` writes them anew from the committed results; a test fails when
README.md says something else than they do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import paper_figures as figures

HERE = Path(__file__).parent
KINDS = ("plain", "tagged", "multiverse")
MULTIVERSE_MODES = ("one branch at a time", "parallel")
Results = Mapping[str, Any]
"""File name without suffix -> its content."""


def read_results(folder: Path) -> dict[str, Any]:
    """All results of a folder."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def seeds_of(results: Results, kind: str) -> list[Any]:
    """The runs of one kind, one for each seed that there is."""
    return [results[name] for name in sorted(results) if re.fullmatch(rf"{kind}-\d+", name)]


def percent(run: Any, name: str) -> float:
    """Right answers of a set, in percent."""
    right: list[int] = run["sets"][name]["right"]
    return 100 * sum(right) / len(right)


def accuracy_table(results: Results) -> list[str]:
    """Right answers of the three kinds, mean and standard deviation over seeds."""
    kinds = [kind for kind in KINDS if seeds_of(results, kind)]
    sets = list(seeds_of(results, kinds[0])[0]["sets"])
    counts = {kind: len(seeds_of(results, kind)) for kind in kinds}
    lines = _header("right answers, %", *(f"{kind} ({n} seed{'s' * (n != 1)})" for kind, n in counts.items()))
    for name in sets:
        cells = []
        for kind in kinds:
            values = [percent(run, name) for run in seeds_of(results, kind)]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}")
        lines.append(_row(_title(name), *cells))
    return lines


def mend_table(results: Results) -> list[str]:
    """Right answers of single runs, a line each, with and without what carries a model beyond its training."""
    names = {
        "multiverse-0": "the whole recipe",
        "unlabelled-lists": "lists without labels",
        "no-links": "names without links",
        "looks-back": "steps looked up in the question",
        "no-spare-definitions": "no spare definitions",
        "no-long-lists": "no long lists",
        "fixed-labels": "labels from 1",
        "no-label-gaps": "labels without gaps",
        "no-position-gaps": "no gaps in positions",
        "no-first-batches": "no first batches",
        "forced-loss": "loss on forced tokens",
        "official-positions": "official positions",
        "official-mask": "official mask, with its leak",
        "mixture": "the paper's mixture",
        "given-values-0": "values given",
        "given-values-1": "values given, other seed",
        "back-links-0": "values given, links back",
        "back-links-1": "values given, links back, other seed",
        "low-trees-0": "values given, links back, low trees",
        "low-trees-1": "values given, links back, low trees, other seed",
        "tagged-back-links-0": "tagged: values given, links back",
        "plain-back-links-0": "plain: values given, links back",
    }
    sets = list(results["multiverse-0"]["sets"])
    lines = _header("right answers, %", *(" ".join(reversed(name.split("-"))) for name in sets))
    for run, title in names.items():
        if run in results:
            lines.append(_row(title, *(f"{percent(results[run], name):.0f}" for name in sets)))
    return lines


def alone_table(results: Results) -> list[str]:
    """Wall clock of answers one at a time: of the Multiverse model where it is right in both its modes, beside the
    plain model where that one is right too."""
    lines = _header(
        "paths",
        "right, multiverse",
        "right, plain too",
        "# parallel",
        "ms, one branch at a time",
        "ms, in parallel",
        "over branches",
        "ms, plain",
        "net speedup",
    )
    modes = results["alone"]["modes"]
    own = figures.right_in_all({mode: rows for mode, rows in modes.items() if mode != "plain"})
    for chains, rows in figures.right_in_all(modes).items():
        asked = sum(row["chains"] == chains for row in modes["parallel"])
        counts = (f"{len(found['parallel'])} of {asked}" for found in (own[chains], rows))
        if not own[chains]["parallel"]:
            lines.append(_row(chains, *counts, *["-"] * 6))
            continue
        shape = sum(row["tokens"] for row in own[chains]["parallel"]) / sum(
            row["critical"] for row in own[chains]["parallel"]
        )
        serial, parallel = (mean(row["seconds"] for row in own[chains][mode]) for mode in MULTIVERSE_MODES)
        cells = (f"{shape:.2f}", f"{1000 * serial:.0f}", f"{1000 * parallel:.0f}", f"{serial / parallel:.2f}")
        lines.append(_row(chains, *counts, *cells, *_beside_plain(rows)))
    return lines


def _beside_plain(rows: Mapping[str, list[Any]]) -> tuple[str, str]:
    """Milliseconds of plain answers and the net speedup, over problems that all modes answered right."""
    if not rows["parallel"]:
        return "-", "-"
    plain, parallel = (mean(row["seconds"] for row in rows[mode]) for mode in ("plain", "parallel"))
    return f"{1000 * plain:.0f}", f"{plain / parallel:.2f}"


def batch_table(results: Results) -> list[str]:
    """Speedup over the number of answers at once; net only where nine of ten plain answers are right, for a wrong one
    ends at any length."""
    lines = _header(
        "answers at once",
        "right, multiverse",
        "right, plain",
        "ms, one branch at a time",
        "ms, in parallel",
        "over branches",
        "net speedup",
    )
    modes = results["batched"]["modes"]
    for plain, serial, parallel in zip(*(modes[mode] for mode in ("plain", *MULTIVERSE_MODES)), strict=True):
        is_measure = plain["right"] >= 0.9 * plain["batch"]
        cells = (f"{1000 * row['seconds']:.0f}" for row in (serial, parallel))
        ratio = f"{serial['seconds'] / parallel['seconds']:.2f}"
        net = f"{plain['seconds'] / parallel['seconds']:.2f}" if is_measure else "-"
        lines.append(_row(plain["batch"], parallel["right"], plain["right"], *cells, ratio, net))
    return lines


def time_table(results: Results) -> list[str]:
    """Right answers over the time that is given, for problems no larger than those of the training."""
    rows = figures.up_to_trained(results["alone"]["modes"])
    modes = ("plain", *MULTIVERSE_MODES)
    longest = max(row["seconds"] for found in rows.values() for row in found)
    step = float(f"{longest / 6:.0e}")  # some six lines, at round numbers
    lines = _header("ms given", "plain", "multiverse, one branch at a time", "multiverse, in parallel")
    for k in range(1, math.ceil(longest / step) + 1):
        cells = (f"{figures.right_within(rows[mode], k * step):.0f}" for mode in modes)
        lines.append(_row(f"{1000 * k * step:.0f}", *cells))
    return lines


def fit_line(results: Results) -> list[str]:
    """The latency of a token as a formula, and the paper's."""
    fit, paper = figures.fit_latency(results["alone"]["modes"]["parallel"]), figures.formula(figures.PAPER_FIT)
    ours = "no fit, all are equally parallel" if fit is None else figures.formula(fit)
    return [f"Milliseconds of a token at # parallel x, batch 1: {ours} (the paper's 32B: {paper})."]


def search_table(results: Results) -> list[str]:
    """Steps of right answers over the size of the search."""
    searcher = figures.searcher(results)
    lines = _header("variables", "steps, `plain-0`", f"steps, `{searcher}`", f"tokens, `{searcher}`")
    for name in (name for name in results["multiverse-0"]["sets"] if name.startswith("variables")):
        cells = []
        for run, measure in (("plain-0", "critical"), (searcher, "critical"), (searcher, "tokens")):
            found = results[run]["sets"][name]
            length = figures.mean_of_right(found, measure)
            cells.append("-" if length is None else f"{length:.0f}")
        lines.append(_row(name.split("-")[1], *cells))
    return lines


def chains_table(results: Results) -> list[str]:
    """Lengths of right answers over the number of chains."""
    return _lengths("paths", results["lengths"]["chains"])


def depth_table(results: Results) -> list[str]:
    """Lengths of right answers over the size of a search."""
    return _lengths("variables", results["lengths"]["variables"])


def _lengths(what: str, rows: list[Any]) -> list[str]:
    lines = _header(what, "tokens, plain", "tokens, tagged", "longest chain", "# parallel", "net")
    for row in rows:
        cells = (f"{row[name]:.0f}" for name in ("plain", "tagged", "critical"))
        ratios = (f"{row[name] / row['critical']:.2f}" for name in ("tagged", "plain"))
        lines.append(_row(row["size"], *cells, *ratios))
    return lines


def training_table(results: Results) -> list[str]:
    """What was trained, and where."""
    lines = _header("run", "parameters", "steps", "tokens", "last loss", "tokens/s", "device")
    for name, run in results.items():
        if "steps" in run:
            sizes = (f"{run[key]:,}" for key in ("parameters", "steps", "tokens"))
            lines.append(_row(name, *sizes, f"{run['loss']:.4f}", f"{run['tokens_per_s']:,}", run["device"]))
    from settings import runs  # needs torch, which the other tables do not

    if missing := [name for name in runs() if name not in results]:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    return lines


TABLES: dict[str, tuple[Callable[[Results], list[str]], tuple[str, ...]]] = {
    "chains": (chains_table, ("lengths",)),
    "depth": (depth_table, ("lengths",)),
    "accuracy": (accuracy_table, ("plain-0",)),
    "mend": (mend_table, ("multiverse-0",)),
    "alone": (alone_table, ("alone",)),
    "batch": (batch_table, ("batched",)),
    "time": (time_table, ("alone",)),
    "fit": (fit_line, ("alone",)),
    "search": (search_table, ("multiverse-0", "plain-0")),
    "training": (training_table, ("plain-0",)),
}
"""Each table, and the results without which there is none."""


def tables(results: Results) -> dict[str, str]:
    """All tables that the results allow, as Markdown."""
    return {
        name: "\n".join(make(results))
        for name, (make, needed) in TABLES.items()
        if all(result in results for result in needed)
    }


def filled(text: str, results: Results) -> str:
    """A text with each table between its marks, ``<!-- NAME -->`` and ``<!-- end -->``, made anew."""
    made = tables(results)

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{made.get(match[1], 'Not measured yet.')}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def write_report(results_folder: Path, output: Path) -> None:
    """Write report.md and the figures into `output`."""
    results = read_results(results_folder)
    output.mkdir(parents=True, exist_ok=True)
    parts = [f"## {name}\n\n{table}\n" for name, table in tables(results).items()]
    (output / "report.md").write_text("\n".join(parts), encoding="utf-8")
    draw(results, output)
    print(f"{output / 'report.md'} and figures beside it")


def draw(results: Results, folder: Path) -> None:
    """The figures that the results allow."""
    if "multiverse-0" in results and "plain-0" in results:
        figures.draw_accuracy(results, folder / "accuracy.png")
    if "lengths" in results:
        figures.draw_lengths(results["lengths"], folder / "lengths.png")
    if "alone" in results and "batched" in results:
        figures.draw_speed(results["alone"]["modes"], results["batched"]["modes"], folder / "speed.png")


def _header(*cells: str) -> list[str]:
    return [_row(*cells), "|" + " --- |" * len(cells)]


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _title(name: str) -> str:
    task, number = name.split("-")
    return f"{number} {task}" + (", more than trained" if int(number) > figures.TRAINED else "")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Where the results lie."""

    results: Path = HERE / "results"
    """Folder with the JSON files."""
    readme: Path = HERE / "README.md"
    """Text whose tables are made anew."""


def main() -> None:
    from megatron_multiverse.cli import parse_options

    options = parse_options(ReportOptions)
    results = read_results(options.results)
    options.readme.write_text(filled(options.readme.read_text(encoding="utf-8"), results), encoding="utf-8")
    draw(results, options.results)


if __name__ == "__main__":
    from megatron_multiverse.cli import run_tool

    run_tool(main)
