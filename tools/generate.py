"""Answers prompts with a Multiverse model, decoding the paths of a block in parallel.

Example:
    python tools/generate.py --load examples/quickstart/model --prompt "..."
    python tools/generate.py --load MODEL --input prompts.jsonl --output answers.jsonl \\
        --sampling.temperature 0.7 --sampling.n 4
    torchrun --nproc-per-node 2 tools/generate.py --load MODEL --prompt "..." --tensor-model-parallel-size 2

Answers are written as they finish; "index" says which row of the input they answer. Rows that cannot be answered are
written with the reason, and the exit status is 1 then.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TYPE_CHECKING

from megatron_multiverse.cli import parse_options, run_tool

if TYPE_CHECKING:
    from megatron_multiverse.data.tokenizers import MultiverseTokenizer
    from megatron_multiverse.inference import TokenCallback
    from megatron_multiverse.inference.generate import GenerateConfig


def main() -> None:
    from megatron_multiverse.inference.build import engine_ranks
    from megatron_multiverse.inference.generate import GenerateConfig, follow_answers

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = parse_options(GenerateConfig)
    with engine_ranks(config.tensor_model_parallel_size, config.pipeline_model_parallel_size) as ranks:
        if not ranks.is_first:
            follow_answers(config)
            return
        refused = show_answers(config)
    if refused:
        sys.exit(f"{refused} rows could not be answered; each says why in its field error")


def show_answers(config: GenerateConfig) -> int:
    """Write or print all answers; returns how many rows could not be answered."""
    from megatron_multiverse.inference.generate import generate_answers, write_answers
    from megatron_multiverse.views.terminal import LiveBranches

    refused = 0
    if config.output is not None:
        answered, refused = write_answers(config)
        print(f"wrote {answered} answers to {config.output}")
    else:
        screen = contextlib.ExitStack()

        def watch(tokenizer: MultiverseTokenizer, prompt: str) -> TokenCallback:
            return screen.enter_context(LiveBranches(tokenizer.detokenize, title=prompt)).on_token

        with screen:
            rows = list(generate_answers(config, watch=watch)) if config.live else generate_answers(config)
        for row in rows:
            if "text" not in row:
                refused += 1
                print(f"-- row {row['index']}: {row['error']}", file=sys.stderr)
                continue
            if not config.live:
                print(row["text"], flush=True)
            dropped = row["dropped_tokens"]
            print(
                f"-- row {row['index']}, {row['finish_reason']}: {row['tokens']} tokens, {row['critical_tokens']} "
                f"on the longest chain, num_parallel {row['num_parallel']:.2f}, {row['decode_steps']} steps"
                + (f", tries dropped after {dropped} tokens, {row['freed_pages']} pages came free" if dropped else ""),
                file=sys.stderr,
            )
    return refused


if __name__ == "__main__":
    run_tool(main)
