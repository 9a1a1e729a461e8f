"""Reinforcement learning on parallel rollouts: a YAML file plus dotted overrides.

Example:
    python pretrain_scripts/rl_multiverse.py --config pretrain_scripts/configs/rl_quickstart.yaml --train_iters 20

Exit code 0: the run is finished. 75: SIGTERM or SIGUSR1 stopped it, and it saved; the same command continues it.
"""

from __future__ import annotations

import logging
import sys

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import RLConfig


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    config = parse_options(RLConfig)
    from megatron_multiverse.training.signals import EXIT_CODE_STOPPED, StopSignals

    # To the end of the process: neither a signal before the first step nor one after the last save may kill it.
    stop = StopSignals()
    stop.__enter__()
    from megatron_multiverse.rl.trainer import train

    sys.exit(EXIT_CODE_STOPPED if train(config, stop=stop).stopped_by is not None else 0)


if __name__ == "__main__":
    run_tool(main)
