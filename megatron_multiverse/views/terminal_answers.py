"""Answers written to a file or shown in the terminal: what tools/generate.py prints."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.inference import TokenCallback
from megatron_multiverse.inference.generate import GenerateConfig, generate_answers, write_answers
from megatron_multiverse.views.terminal import LiveBranches


def show_answers(config: GenerateConfig) -> int:
    """Write or print all answers; returns how many rows could not be answered."""
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
            if "text" in row:
                if not config.live:
                    print(row["text"], flush=True)
                print(facts(row), file=sys.stderr)
            if row["finish_reason"] == "error":
                refused += 1
                print(f"-- row {row['index']}: {row['error']}", file=sys.stderr)
    return refused


def facts(row: dict[str, Any]) -> str:
    """One line about an answer."""
    dropped = row["dropped_tokens"]
    return (
        f"-- row {row['index']}, {row['finish_reason']}: {row['tokens']} tokens, {row['critical_tokens']} on the "
        f"longest chain, num_parallel {row['num_parallel']:.2f}, {row['decode_steps']} steps"
        + (f", tries dropped after {dropped} tokens, {row['freed_pages']} pages came free" if dropped else "")
    )
