"""Supervised fine-tuning on Multiverse data: a YAML file plus dotted overrides.

Example:
    python pretrain_scripts/sft_multiverse.py --config pretrain_scripts/configs/tiny_cpu.yaml --optim.lr 1e-4

Exit code 0: the run is finished. 75: SIGTERM or SIGUSR1 stopped it, and it saved; the same command continues it.
"""

from __future__ import annotations

import logging
import sys

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import TrainConfig


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    config = parse_options(TrainConfig)
    from megatron_multiverse.training.signals import EXIT_CODE_STOPPED
    from megatron_multiverse.training.trainer import train

    result = train(config)
    sys.exit(EXIT_CODE_STOPPED if result.stopped_by is not None else 0)


if __name__ == "__main__":  # loader workers import this file where processes are spawned
    run_tool(main)
