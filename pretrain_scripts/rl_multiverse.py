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
from megatron_multiverse.config.dry_run import check_dry_run


@dataclass(frozen=True, kw_only=True)
class Options(RLConfig):
    """The run, and whether it is only looked at."""

    dry_run: bool = False
    """Look at the settings, the model, its tokenizer, the prompts and the rewards, print what the run would do and what
    each rank will need, and stop. Needs no GPU; WORLD_SIZE says for how many ranks."""
    dry_run_shape: str | None = None
    """Published shape, e.g. qwen2.5-7b, for a dry run where the checkpoint that init_from names is not at hand; prompts
    are then read where task.tokenizer_model is set."""
    dry_run_steps: int = 0
    """Steps that a dry run also takes, answers, rewards and updates, on the run's own ranks, devices and prompts, to
    print their time and memory; they are not saved. 0 or at least 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dry_run(self.dry_run, self.dry_run_shape, self.dry_run_steps)


def dry_run(config: RLConfig, options: Options) -> None:
    """Print what the run would do and need, by arithmetic and, if asked for, by a few steps of it."""
    from megatron_multiverse.rl.dry_run import report
    from megatron_multiverse.rl.trial import try_steps

    # Before the ranks meet: the report makes process groups of its own. One of them speaks for all.
    lines, speaks = report(config, options.dry_run_shape), os.environ.get("RANK", "0") == "0"
    if speaks:
        print(lines, flush=True)
    if options.dry_run_steps:
        lines = try_steps(config, options.dry_run_steps)
        if speaks:
            print(lines)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    options = parse_options(Options)
    config = narrowed(options, RLConfig)
    if options.dry_run:
        dry_run(config, options)
        return
    from megatron_multiverse.training.signals import EXIT_CODE_STOPPED, StopSignals

    # To the end of the process: neither a signal before the first step nor one after the last save may kill it.
    stop = StopSignals()
    stop.__enter__()
    from megatron_multiverse.rl.trainer import train

    sys.exit(EXIT_CODE_STOPPED if train(config, stop=stop).stopped_by is not None else 0)


if __name__ == "__main__":
    run_tool(main)
