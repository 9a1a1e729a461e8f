"""Sequential reasoning chains -> checked parallel training data, with a language model. See --help, docs/curation.md.

Example:
    python tools/curate_data.py --input s1k.jsonl --output runs/curated --model claude-sonnet-5-5 --limit 5
"""

from __future__ import annotations

import logging
import sys

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.curation.config import CurateConfig
from megatron_multiverse.curation.curate import ask_on_terminal, curate_data
from megatron_multiverse.curation.estimate import Estimate


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx2", "httpcore2", "anthropic", "openai", "math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.WARNING)
    config = parse_options(CurateConfig)
    result = curate_data(config, ask_on_terminal)
    if isinstance(result, Estimate):
        print(result.text(is_batch=config.batch, is_cached=config.cache))
        return
    for line in result.tally.lines():
        print(line)
    print(f"rows        {config.output}/rows.jsonl")
    print(f"report      {config.output}/report.md")
    if result.stopped is not None:
        sys.exit(f"error: {result.tally.open} samples are left: {result.stopped}; the same command goes on with them")
    if result.unanswered:
        sys.exit(
            f"error: {result.tally.set_aside['provider']} samples got no answer, the first because "
            f"{result.unanswered}; the same command asks for them again"
        )


if __name__ == "__main__":
    run_tool(main)
