"""How parallel the texts of an output or of a data set are: distributions as figures and pictures.

Example:
    python tools/analyze_parallelism.py --input runs/evaluation/samples.jsonl --output runs/parallelism
"""

from __future__ import annotations

import logging
import sys

from megatron_multiverse.cli import parse_options, run_tool


def main() -> None:
    from megatron_multiverse.evaluation.parallelism import AnalyzeConfig, analyze, pictures, report_lines

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    config = parse_options(AnalyzeConfig)
    for line in report_lines(analyze(config)):
        print(line)
    print(pictures(config.output))


if __name__ == "__main__":
    run_tool(main)
