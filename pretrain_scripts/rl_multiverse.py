"""Reinforcement learning on parallel rollouts: a YAML file plus dotted overrides.

Examples:
    python pretrain_scripts/rl_multiverse.py --config pretrain_scripts/configs/rl_quickstart.yaml --train_iters 20
    WORLD_SIZE=8 python pretrain_scripts/rl_multiverse.py --config my_run.yaml --dry-run

Exit code 0: the run is finished. 75: SIGTERM or SIGUSR1 stopped it, and it saved; the same command continues it.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass

from megatron_multiverse.cli import narrowed, parse_options, run_tool
from megatron_multiverse.config import RLConfig
from megatron_multiverse.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options(RLConfig):
    """The run, and whether it is only looked at."""

    dry_run: bool = False
    """Look at the settings, the model, its tokenizer, the prompts and the rewards, print what the run would do and what
    each rank will need, and stop. Needs no GPU; WORLD_SIZE says for how many ranks."""
    dry_run_shape: str | None = None
    """Published shape, e.g. qwen2.5-7b, for a dry run where the checkpoint that init_from names is not at hand; prompts
    are then read where task.tokenizer_model is set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dry_run_shape is not None and not self.dry_run:
            raise ConfigError(
                f"dry_run_shape {self.dry_run_shape} has no effect without --dry-run: set both or neither"
            )


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    options = parse_options(Options)
    config = narrowed(options, RLConfig)
    if options.dry_run:
        from megatron_multiverse.rl.dry_run import report

        lines = report(config, options.dry_run_shape)
        if os.environ.get("RANK", "0") == "0":
            print(lines)
        return
    from megatron_multiverse.training.signals import EXIT_CODE_STOPPED, StopSignals

    # To the end of the process: neither a signal before the first step nor one after the last save may kill it.
    stop = StopSignals()
    stop.__enter__()
    from megatron_multiverse.rl.trainer import train

    sys.exit(EXIT_CODE_STOPPED if train(config, stop=stop).stopped_by is not None else 0)


if __name__ == "__main__":
    run_tool(main)
