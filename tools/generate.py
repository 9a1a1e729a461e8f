"""Answers prompts with a Multiverse model, decoding the paths of a block in parallel.

Example:
    python tools/generate.py --load examples/quickstart/model --prompt "..."
    python tools/generate.py --load MODEL --input prompts.jsonl --output answers.jsonl \\
        --sampling.temperature 0.7 --sampling.n 4
    python tools/generate.py --load MODEL --input conversations.jsonl --output answers.jsonl --chat --replay-structure
    torchrun --nproc-per-node 2 tools/generate.py --load MODEL --prompt "..." --tensor-model-parallel-size 2

Answers are written as they finish; "index" says which row of the input they answer. Rows that cannot be answered are
written with the reason, and the exit status is 1 then.
"""

from __future__ import annotations

import logging
import sys

from megatron_multiverse.cli import parse_options, run_tool


def main() -> None:
    """Answer on the first rank; the others compute along."""
    from megatron_multiverse.inference.build import engine_ranks
    from megatron_multiverse.inference.generate import GenerateConfig, follow_answers
    from megatron_multiverse.views.terminal_answers import show_answers

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = parse_options(GenerateConfig)
    with engine_ranks(config.tensor_model_parallel_size, config.pipeline_model_parallel_size) as ranks:
        if not ranks.is_first:
            follow_answers(config)
            return
        refused = show_answers(config)
    if refused:
        sys.exit(f"{refused} rows could not be answered; each says why in its field error")


if __name__ == "__main__":
    run_tool(main)
