"""The quickstart: a small model thinks in parallel before your eyes, is measured, and a smaller one is trained.

`make quickstart` runs it after the installation. Everything lands in runs/quickstart.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions:
    """What the quickstart does."""

    model: Path = HERE / "model"
    """Hugging Face folder with the trained model and its tokenizer."""
    output: Path = HERE.parents[1] / "runs" / "quickstart"
    """Folder for report.json, timeline.png and the training run."""
    num_problems: int = 100
    """Fresh problems to measure on."""
    latency_problems: int = 5
    """Problems answered one at a time for the wall clock."""
    larger_problems: int = 8
    """Problems of each larger kind: 6 expressions, 8 expressions, nested to depth 3."""
    train_iters: int = 300
    """Steps of the training run."""
    seed: int = 0
    """Other seeds give other problems."""
    skip_training: bool = False
    """Only decode."""


def main() -> None:
    from megatron_multiverse.cli import parse_options

    options = parse_options(QuickstartOptions)
    started = time.perf_counter()
    report, untimed = decode_and_measure(options, started)
    if options.skip_training:
        report |= untimed()
    else:
        from pipeline import run_pipeline

        heading("A training run through the whole pipeline")
        training = options.output / "training"
        report |= run_pipeline(training, train_iters=options.train_iters, meanwhile=untimed)
        print(f"loss {report['loss_first']:.3f} -> {report['loss_last']:.3f} in {report['train_iters']} steps")
    report["total_seconds"] = time.perf_counter() - started

    from report import print_checks, shortfalls, write_report

    heading("The decoded answers, checked")
    print_checks(report)
    write_report(report, options.output / "report.json")
    print(f"\n{report['total_seconds']:.0f} s in all. Figures: {options.output / 'report.json'}")
    print(f"Picture of one answer: {options.output / 'timeline.png'}")
    if found := shortfalls(report):
        sys.exit("error: " + "; ".join(found))


def decode_and_measure(
    options: QuickstartOptions, started: float
) -> tuple[dict[str, object], Callable[[], dict[str, object]]]:
    """Show a few problems live, then measure.

    Args:
        options: those of the command.
        started: `time.perf_counter()` at its start.

    Returns:
        The figures, and a function that gives those for which no clock runs: it can wait for a core with time to spare.
    """
    heading("Converting the model from Hugging Face to megatron-core")
    from pipeline import convert_model

    model = convert_model(options.model, options.output / "converted")
    heading("Loading the model")
    import torch

    torch.set_num_threads(1)  # the matrices are so small that a second thread costs more than it gives
    from decode import Decoder
    from measure import (
        answer_one_at_a_time,
        draw_answer,
        fresh_problems,
        measure_answers,
        measure_larger_problems,
        measure_latency,
        measure_logits,
        show_live,
    )
    from report import print_modes

    decoder = Decoder(model)
    print(f"{decoder.config.num_parameters:,} parameters from {model}")
    heading("Fresh problems, decoded in parallel branches")
    first_answer = show_live(decoder, seed=options.seed) - started
    heading(f"{options.num_problems} fresh problems: in parallel, one branch at a time, without blocks")
    problems = fresh_problems(options.num_problems, seed=options.seed)
    alone = answer_one_at_a_time(decoder, problems[: options.latency_problems])
    # One with nested blocks and few paths, if there is one.
    shown = min(range(len(alone)), key=lambda k: (problems[k].depth < 2, len(problems[k].expressions)))
    draw_answer(problems[shown], alone[shown], options.output / "timeline.png")
    report: dict[str, object] = {"first_answer_seconds": first_answer}
    report |= measure_latency(alone)
    report |= measure_answers(decoder, problems)
    print_modes(report)

    def untimed() -> dict[str, object]:
        larger = measure_larger_problems(decoder, options.larger_problems, seed=options.seed)
        return measure_logits(decoder, problems[:3]) | larger

    return report, untimed


def heading(text: str) -> None:
    """A line that starts a stage."""
    print(f"\n=== {text} ===", flush=True)


if __name__ == "__main__":
    from megatron_multiverse.cli import run_tool

    run_tool(main)
