"""Hugging Face <-> megatron-core, on a CPU, one tensor at a time. See --help and docs/checkpoints.md.

Example:
    python tools/convert_checkpoint.py --from hf --to mcore --load Qwen2.5-32B-Instruct --save qwen2.5-32b \\
        --tensor-model-parallel-size 8 --pipeline-model-parallel-size 2 --add-control-tokens
"""

from __future__ import annotations

import logging
import os
import sys

# Huge pages for large tensors; with small ones most of the time goes into page faults. Must come before torch.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from megatron_multiverse.checkpoints.convert import convert_checkpoint
from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.cli import parse_options, run_tool


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    result = convert_checkpoint(parse_options(ConvertConfig))
    rate = (result.num_bytes - result.resumed_bytes) / max(result.seconds, 1e-9) / 1e9
    done = f"{result.units} units" + (f", {result.resumed_units} of an earlier run" if result.resumed_units else "")
    print(f"wrote {result.folder}: {result.num_bytes / 1e9:.2f} GB, {done}, {result.seconds:.1f} s ({rate:.2f} GB/s)")


if __name__ == "__main__":
    run_tool(main)
