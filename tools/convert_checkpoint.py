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

from tqdm import tqdm

from megatron_multiverse.checkpoints.convert import convert_checkpoint
from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.cli import parse_options, run_tool


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    result = convert_checkpoint(parse_options(ConvertConfig))
    size = tqdm.format_sizeof(result.num_bytes, "B")
    rate = tqdm.format_sizeof((result.num_bytes - result.resumed_bytes) / max(result.seconds, 1e-9), "B/s")
    done = f"{result.units} unit{'s' * (result.units != 1)}"
    done += f", {result.resumed_units} of an earlier run" if result.resumed_units else ""
    print(f"wrote {result.folder}: {size}, {done}, {result.seconds:.1f} s ({rate})")


if __name__ == "__main__":
    run_tool(main)
