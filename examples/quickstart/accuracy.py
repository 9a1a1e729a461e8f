"""Accuracy of a model folder on fresh problems, as many as you like, on a GPU if there is one; writes JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is measured."""

    model: Path = Path(__file__).parent / "model"
    """Folder with the model and its tokenizer."""
    output: Path
    """JSON file for the figures."""
    num_problems: int = 1000
    """Fresh held-out problems."""
    larger_problems: int = 100
    """Problems of each larger kind: 6 expressions, 8 expressions, nested to depth 3."""
    seed: int = 1
    """Other seeds give other problems."""


def main() -> None:
    import torch
    from decode import Decoder
    from measure import fresh_problems, measure_answers, measure_larger_problems
    from report import write_report

    from megatron_multiverse.cli import parse_options

    options = parse_options(EvaluateOptions)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A GPU is hardly busier with 512 branches than with 64.
    rows = 512 if device == "cuda" else 64
    decoder = Decoder(options.model, device=device, max_rows=rows, num_pages=128 * rows)
    report = measure_answers(decoder, fresh_problems(options.num_problems, seed=options.seed))
    report |= measure_larger_problems(decoder, options.larger_problems, seed=options.seed)
    write_report(report, options.output)
    print(options.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    from megatron_multiverse.cli import run_tool

    run_tool(main)
