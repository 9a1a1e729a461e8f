"""Accuracy and speed of a model on the benchmarks of the field, and two runs beside each other. See docs/evaluation.md.

Example:
    python tools/evaluate.py --load MODEL --tasks aime24,aime25,math500 --num-seeds 8 --output runs/multiverse
    python tools/evaluate.py --url http://127.0.0.1:5000 --tasks math500 --thinking parallel sequential
    python tools/evaluate.py --compare runs/autoregressive runs/multiverse --output runs/comparison

Every finished answer is on the disk. The same command goes on where a run ended; --num-seeds, --tasks, --budgets and
--thinking may grow then. The exit status is 1 where answers are missing.
"""

from __future__ import annotations

import logging
import sys

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.evaluation.config import EvaluateConfig


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx2", "httpcore2", "megatron", "math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.WARNING)
    config = parse_options(EvaluateConfig)
    from megatron_multiverse.evaluation.report import comparison_lines, score_lines
    from megatron_multiverse.evaluation.run import compare, evaluate

    if config.compare:
        print("\n".join(comparison_lines(compare(config))))
        print(f"report  {config.output}/comparison.md")
        return
    result = evaluate(config)
    print("\n".join(score_lines(result.scores)))
    print(f"report  {config.output}/report.md")
    if result.missing:
        sys.exit(
            f"error: {result.missing} answers are missing, the first because {result.first_error}; the same command "
            "asks for them again"
        )


if __name__ == "__main__":
    run_tool(main)
