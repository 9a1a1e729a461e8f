"""Answers with parallel blocks through a server that has only plain completions, such as vLLM or SGLang.

Example:
    python tools/serve_by_reprefill.py --url http://127.0.0.1:8000 --prompt "Work out A = 583 + 967; B = 48 + 76."
    python tools/serve_by_reprefill.py --url http://127.0.0.1:8000 --input prompts.jsonl --output answers.jsonl

Each path is a request of its own, and so is what follows a block, with all paths in its prompt. A Multiverse model is
served outside its training mask that way: the conclusion reads path 2 after path 1 (docs/serving.md says how much that
changes). Use it where this project's engine cannot run, or to compare.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys

from megatron_multiverse.cli import parse_options, run_tool

FIGURES = (
    "{tokens} tokens, {critical_tokens} on the longest chain; {requests} requests, {prompt_tokens} tokens of prompts "
    "({cached_tokens} cached), {seconds:.2f} s"
)


async def run() -> None:
    """Print or write the answers."""
    from megatron_multiverse.clients.reprefill import ReprefillConfig, answers

    config = parse_options(ReprefillConfig)
    with contextlib.ExitStack() as stack:
        output = sys.stdout
        if config.output is not None:
            config.output.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(config.output.open("w", encoding="utf-8"))
        async for row in answers(config):
            if config.prompt is not None:
                print(row["text"])
                print(FIGURES.format(**row), file=sys.stderr)
            else:
                print(json.dumps(row), file=output, flush=True)


if __name__ == "__main__":
    run_tool(lambda: asyncio.run(run()))
