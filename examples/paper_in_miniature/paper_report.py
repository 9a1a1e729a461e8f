"""Tables and figures of the miniature from results/*.json alone, and the parts of README.md between its marks.

`python examples/paper_in_miniature/paper_report.py` writes them anew from the committed results; a test fails when
README.md says something else than they do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from paper_figures import draw_accuracy, draw_lengths, draw_speed, right_in_all

HERE = Path(__file__).parent
TRAINED = 4
"""Most chains and most variables of training rows, as training_rows.py says, which needs torch."""
KINDS = ("plain", "tagged", "multiverse")
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
    lines = _header("right answers, %", *(f"{kind} ({len(seeds_of(results, kind))} seeds)" for kind in kinds))
    for name in sets:
        cells = []
        for kind in kinds:
            values = [percent(run, name) for run in seeds_of(results, kind)]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}")
        lines.append(_row(_title(name), *cells))
    return lines


def mend_table(results: Results) -> list[str]:
    """Right answers on the sets beyond training, with and without what mends them."""
    names = {
        "multiverse-0": "the whole recipe",
        "no-name-list": "no list of names",
        "looks-back": "steps looked up in the question",
        "no-spare-definitions": "no spare definitions",
        "no-long-lists": "no long lists",
        "fixed-labels": "labels from 1",
        "no-position-gaps": "no gaps in positions",
        "no-first-batches": "no first batches",
        "forced-loss": "loss on forced tokens",
        "official-positions": "official positions",
    }
    runs = {name: title for name, title in names.items() if name in results}
    lines = _header("right answers, %", *runs.values())
    for name in results["multiverse-0"]["sets"]:
        lines.append(_row(_title(name), *(f"{percent(results[run], name):.1f}" for run in runs)))
    return lines


def alone_table(results: Results) -> list[str]:
    """Wall clock of answers one at a time, over the problems that all modes answered right."""
    lines = _header(
        "paths",
        "right in all modes",
        "# parallel",
        "ms, plain",
        "ms, one branch at a time",
        "ms, in parallel",
        "net speedup",
        "over branches",
    )
    modes = results["alone"]["modes"]
    for chains, rows in right_in_all(modes).items():
        count = f"{len(rows['parallel'])} of {sum(row['chains'] == chains for row in modes['parallel'])}"
        if not rows["parallel"]:
            lines.append(_row(chains, count, *["-"] * 6))
            continue
        seconds = {mode: mean(row["seconds"] for row in found) for mode, found in rows.items()}
        shape = sum(row["tokens"] for row in rows["parallel"]) / sum(row["critical"] for row in rows["parallel"])
        plain, serial, parallel = (seconds[mode] for mode in ("plain", "one branch at a time", "parallel"))
        cells = (f"{1000 * value:.0f}" for value in (plain, serial, parallel))
        lines.append(_row(chains, count, f"{shape:.2f}", *cells, f"{plain / parallel:.2f}", f"{serial / parallel:.2f}"))
    return lines


def batch_table(results: Results) -> list[str]:
    """Net speedup over the number of answers at once."""
    lines = _header(
        "answers at once",
        "right, plain",
        "right, in parallel",
        "ms, plain",
        "ms, in parallel",
        "net speedup",
        "over branches",
    )
    modes = results["batched"]["modes"]
    for rows in zip(*(modes[mode] for mode in ("plain", "one branch at a time", "parallel")), strict=True):
        plain, serial, parallel = (row["seconds"] for row in rows)
        cells = (*(row["right"] for row in rows[::2]), *(f"{1000 * value:.0f}" for value in (plain, parallel)))
        lines.append(_row(rows[0]["batch"], *cells, f"{plain / parallel:.2f}", f"{serial / parallel:.2f}"))
    return lines


def search_table(results: Results) -> list[str]:
    """Steps of right answers over the size of the search."""
    lines = _header("variables", "steps, plain", "steps, in parallel", "tokens, in parallel")
    for name in (name for name in results["multiverse-0"]["sets"] if name.startswith("variables")):
        cells = []
        for run, measure in (("plain-0", "critical"), ("multiverse-0", "critical"), ("multiverse-0", "tokens")):
            found = results[run]["sets"][name]
            values = [value for value, right in zip(found[measure], found["right"], strict=True) if right]
            cells.append(f"{mean(values):.0f}" if values else "-")
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
        draw_accuracy(results, folder / "accuracy.png")
    if "lengths" in results:
        draw_lengths(results["lengths"], folder / "lengths.png")
    if "alone" in results and "batched" in results:
        draw_speed(results["alone"]["modes"], results["batched"]["modes"], folder / "speed.png")


def _header(*cells: str) -> list[str]:
    return [_row(*cells), "|" + " --- |" * len(cells)]


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _title(name: str) -> str:
    task, number = name.split("-")
    return f"{number} {task}" + (", more than trained" if int(number) > TRAINED else "")


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
