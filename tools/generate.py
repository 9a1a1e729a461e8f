"""Answers prompts with a Multiverse model, decoding the paths of a block in parallel.

Example:
    python tools/generate.py --load examples/quickstart/model --prompt "..."
    python tools/generate.py --load MODEL --input prompts.jsonl --output answers.jsonl --temperature 0.7
"""

from __future__ import annotations

import json
import sys

from megatron_multiverse.cli import parse_options
from megatron_multiverse.errors import MultiverseError


def main() -> None:
    from megatron_multiverse.inference.generate import GenerateConfig, generate

    config = parse_options(GenerateConfig)
    try:
        rows = list(generate(config))
    except MultiverseError as error:
        sys.exit(f"error: {error}")
    if config.output is not None:
        with config.output.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"wrote {len(rows)} answers to {config.output}")
        return
    for row in rows:
        print(row["text"])
        print(
            f"-- {row['finish_reason']}: {row['tokens']} tokens, {row['critical_tokens']} on the longest chain, "
            f"num_parallel {row['num_parallel']:.2f}, {row['decode_steps']} steps",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
