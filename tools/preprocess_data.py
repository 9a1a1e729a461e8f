"""Rows of prompts and trajectories -> Megatron's .bin/.idx. See --help and docs/data.md.

Example:
    python tools/preprocess_data.py --input rows.jsonl --output-prefix data/train \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model Qwen/Qwen2.5-7B-Instruct --append-eod
"""

from __future__ import annotations

import logging
import sys

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = parse_options(PreprocessConfig)
    result = preprocess_data(config)
    totals, seconds = result.totals, max(result.seconds, 1e-9)
    for line in totals.lines():
        print(line)
    print(f"template    {result.template}")
    if result.seconds:
        rate = f"{totals.documents / seconds:,.1f} docs/s, {totals.text_bytes / seconds / 1e6:.2f} MB/s"
        print(f"wrote       {config.output_prefix}.bin and .idx in {seconds:.1f} s ({rate})")
    if totals.rejected:
        print(f"reasons     {config.output_prefix}_rejected.jsonl")
    if result.too_many_rejected:
        sys.exit(
            f"error: {totals.rejected.total()} rows rejected, --max-rejected allows {config.max_rejected}; "
            "the other rows are written"
        )


if __name__ == "__main__":
    run_tool(main)
