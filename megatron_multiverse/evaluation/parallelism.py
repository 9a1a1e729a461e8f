"""How parallel the texts of an output or of a data set are: what tools/analyze_parallelism.py does."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_multiverse.config import TokenizerType
from megatron_multiverse.data.readers import read_rows
from megatron_multiverse.data.sources import open_source
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.data.turns import RowError
from megatron_multiverse.errors import DataError
from megatron_multiverse.evaluation.text_pages import MostParallel
from megatron_multiverse.evaluation.texts import Texts
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.structure import Statistics, measure, measure_blocks
from megatron_multiverse.views.canvas import DEPTH_COLORS, count_whole, grid, log_horizontally, save
from megatron_multiverse.views.figures import draw_timeline
from megatron_multiverse.views.sample_view import SampleView, ideal_timeline, sequential_timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

_PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """Options of tools/analyze_parallelism.py."""

    input: list[str]
    """Outputs of tools/generate.py (answers.jsonl) or tools/evaluate.py (samples.jsonl); with tokenizer_model also
    records of tools/generate.py and rollouts.jsonl of reinforcement learning; or whatever tools/preprocess_data.py
    takes: JSON Lines, Parquet, folders, trajectory files, data sets."""
    output: Path = Path("runs/parallelism")
    """Folder for parallelism.json, parallelism.png, most_parallel.png and views/*.html."""
    json_keys: list[str] | None = None
    """Columns, as in tools/preprocess_data.py."""
    split: str | None = None
    """Split, as in tools/preprocess_data.py."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """HuggingFaceTokenizer or SentencePieceTokenizer; used with tokenizer_model."""
    tokenizer_model: str = ""
    """Tokenizer to count tokens with; without it each word, tag and newline is one token."""
    limit: int | None = None
    """Only the first so many texts."""
    views: int = 5
    """Write OUTPUT/views/*.html, the plain text beside its tree, for the so many most parallel texts."""


class Collected:
    """Figures of many texts.

    Attributes:
        statistics: of each text.
        paths_per_block: of each block.
        path_tokens: length of each path, its tags included.
        block_savings: of each complete block, steps of its paths one after the other over its own.
        malformed: code -> texts that break this rule.
        num_malformed: texts that break any.
        most_parallel: the text with the most tokens per token of the longest chain.
    """

    def __init__(self) -> None:
        self.statistics: list[Statistics] = []
        self.paths_per_block: list[int] = []
        self.path_tokens: list[int] = []
        self.block_savings: list[float] = []
        self.malformed: Counter[str] = Counter()
        self.num_malformed = 0
        self.most_parallel: SampleView | None = None
        self._most = 0.0

    def add(self, view: SampleView) -> Statistics:
        """Measure one text."""
        found, document = measure(view.document), view.document
        self.statistics.append(found)
        for _, block in document.walk():
            self.paths_per_block.append(len(block.paths))
            self.path_tokens += [path.end - path.start for path in block.paths]
        self.block_savings += [
            block.sequential_tokens / max(block.critical_tokens, 1) for block in measure_blocks(document)
        ]
        self.malformed.update(document.malformed.keys())
        self.num_malformed += bool(document.malformed)
        if found.num_parallel > self._most:
            self._most, self.most_parallel = found.num_parallel, view
        return found

    def report(self) -> dict[str, Any]:
        """All figures as plain values; lengths in tokens. Pooled: all tokens over all tokens of longest chains."""
        every = self.statistics
        critical = max(sum(one.critical_tokens for one in every), 1)
        return {
            "texts": len(every),
            "with_blocks": sum(one.blocks > 0 for one in every),
            "trigger_ratio": sum(one.blocks > 0 for one in every) / len(every),
            "malformed_texts": self.num_malformed,
            "malformed_codes": dict(self.malformed),
            "num_parallel_pooled": sum(one.num_tokens for one in every) / critical,
            "net_gain_pooled": sum(one.plain_tokens for one in every) / critical,
            **{name: _spread(values) for name, values in self._distributions().items()},
        }

    def _distributions(self) -> dict[str, Sequence[float]]:
        names = ("num_parallel", "net_gain", "num_tokens", "critical_tokens", "in_path_share", "blocks", "depth")
        found: dict[str, Sequence[float]] = {
            name: [float(getattr(one, name)) for one in self.statistics] for name in names
        }
        return found | {
            "paths_per_block": self.paths_per_block,
            "path_tokens": self.path_tokens,
            "block_savings": self.block_savings,
        }


def analyze(config: AnalyzeConfig) -> dict[str, Any]:
    """Measure all texts of `config.input`; write the figures and the pictures.

    Returns:
        The figures, as parallelism.json has them.

    Raises:
        ConfigError: no such input, column or tokenizer.
        DataError: no readable text.
    """
    source = open_source(config.input, split=config.split)
    tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model) if config.tokenizer_model else None
    texts = Texts(source, config.json_keys, tokenizer)
    collected, refused, pages = Collected(), Counter[str](), MostParallel(config.views)
    for row in (row for shard in source.shards for row in read_rows(shard)):
        if config.limit is not None and len(collected.statistics) >= config.limit:
            break
        if row.is_blank:
            continue
        try:
            question, text, view = texts.read(row)
            pages.offer(len(collected.statistics) + 1, question, text, view.document, collected.add(view))
        except RowError as error:
            refused[error.code] += 1
    if not collected.statistics:
        raise DataError(f"{' '.join(config.input)} holds no readable text ({dict(refused) or 'no rows'})")
    if refused:
        logger.warning("%d rows are left out: %s", sum(refused.values()), dict(refused))
    report = {"unit": "tokens" if tokenizer else "words and tags", "rows_left_out": dict(refused)} | collected.report()
    config.output.mkdir(parents=True, exist_ok=True)
    write_json_atomic(config.output / "parallelism.json", report)
    draw_distributions(collected, report["unit"], config.output / "parallelism.png")
    pages.write(config.output / "views", report["unit"])
    most, picture = collected.most_parallel, config.output / "most_parallel.png"
    picture.unlink(missing_ok=True)  # of an earlier time
    if most is not None and most.document.blocks:
        title = f"The most parallel text, a {'token' if tokenizer else 'word or tag'} per step and branch"
        lanes, one_lane = ideal_timeline(most), sequential_timeline(most)
        draw_timeline(lanes, picture, sequential=one_lane, title=title, unit=report["unit"])
    return report


def pictures(folder: Path) -> str:
    """What `analyze` has written into a folder for a person to look at, in words."""
    names = [name for name in ("parallelism.png", "most_parallel.png") if (folder / name).is_file()]
    pages = len(list((folder / "views").glob("*.html")))
    return f"pictures  {folder}/{' '.join(names)}" + (f", pages {folder}/views/*.html ({pages})" if pages else "")


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The figures for a terminal."""
    texts = f"{report['texts']} text{'s' * (report['texts'] != 1)}"
    yield f"{texts}, {report['with_blocks']} with blocks, {report['malformed_texts']} malformed"
    yield f"lengths in {report['unit']}"
    yield f"pooled: # parallel {report['num_parallel_pooled']:.3f}, net gain {report['net_gain_pooled']:.3f}"
    yield f"{'':<16} {'mean':>9}" + "".join(f" {f'p{percent}':>9}" for percent in _PERCENTILES) + f" {'max':>9}"
    for name, spread in report.items():
        if isinstance(spread, dict) and "mean" in spread:
            yield f"{name:<16}" + "".join(f" {value:>9.2f}" for value in spread.values())


def draw_distributions(collected: Collected, unit: str, path: str | Path) -> None:
    """Draw six distributions into a PNG."""
    every = collected.statistics
    figure, axes = grid(2, 3, width=13.0, row_height=3.4)
    _histogram(axes[0][0], [one.num_parallel for one in every], "# parallel", f"{unit} / longest chain", "texts")
    label = "plain text / longest chain (above 1 it pays)"
    _histogram(axes[0][1], [one.net_gain for one in every], "net gain", label, "texts", line=1.0)
    longest = max(one.num_tokens for one in every)
    axes[0][2].scatter(
        [one.num_tokens for one in every],
        [one.critical_tokens for one in every],
        s=10,
        alpha=0.5,
        color=DEPTH_COLORS[1],
    )
    axes[0][2].plot([0, longest], [0, longest], color="#aaaaaa", linestyle=":")
    axes[0][2].set(title="length", xlabel=unit, ylabel="longest chain")
    _bars(axes[1][0], collected.paths_per_block, "paths per block", "paths", "blocks")
    _histogram(axes[1][1], collected.path_tokens, "length of paths", unit, "paths", logarithmic=True)
    _bars(axes[1][2], [one.depth for one in every], "depth of nesting", "depth (0: no block)", "texts")
    figure.suptitle(f"{len(every)} text{'s' * (len(every) != 1)}, lengths in {unit}", fontsize=10)
    save(figure, path)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    percentiles = np.percentile(values, _PERCENTILES)
    named = {f"p{percent}": float(value) for percent, value in zip(_PERCENTILES, percentiles, strict=True)}
    return {"mean": float(np.mean(values)), **named, "max": float(max(values))}


def _histogram(
    axis: Axes,
    values: Sequence[float],
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    line: float | None = None,
    logarithmic: bool = False,
) -> None:
    if logarithmic and values:
        axis.hist(values, bins=np.geomspace(min(values), max(values) + 1, 25).tolist(), color=DEPTH_COLORS[1])
        log_horizontally(axis)
    elif values:
        low, high = min(values), max(values)
        axis.hist(values, bins=np.linspace(low, max(high, low + 0.1), 25).tolist(), color=DEPTH_COLORS[1])
    count_whole(axis)
    if line is not None:
        axis.axvline(line, color="black", linewidth=0.8, linestyle=":")
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)


def _bars(axis: Axes, values: Sequence[int], title: str, xlabel: str, ylabel: str) -> None:
    counts = Counter(values)
    if counts:
        axis.bar(list(counts), list(counts.values()), color=DEPTH_COLORS[1])
        axis.set_xticks(range(min(counts), max(counts) + 1))
    count_whole(axis)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
