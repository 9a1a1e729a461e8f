"""Supervised fine-tuning on Multiverse data: a YAML file plus dotted overrides.

Examples:
    python pretrain_scripts/sft_multiverse.py --config pretrain_scripts/configs/tiny_cpu.yaml --optim.lr 1e-4
    torchrun --nproc-per-node 8 pretrain_scripts/sft_multiverse.py --config pretrain_scripts/configs/...yaml
    WORLD_SIZE=16 python pretrain_scripts/sft_multiverse.py --config pretrain_scripts/configs/...yaml --dry-run

Exit code 0: the run is finished. 75: SIGTERM or SIGUSR1 stopped it, and it saved; the same command continues it.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass

from megatron_multiverse.cli import narrowed, parse_options, run_tool
from megatron_multiverse.config import TrainConfig
from megatron_multiverse.config.dry_run import check_dry_run


@dataclass(frozen=True, kw_only=True)
class Options(TrainConfig):
    """The run, and whether it is only looked at."""

    dry_run: bool = False
    """Build the model of every pipeline stage without memory, print what each rank will need, and stop. Needs no GPU;
    WORLD_SIZE says for how many ranks."""
    dry_run_shape: str | None = None
    """Published shape, e.g. qwen2.5-32b, for a dry run where the checkpoint that init_from names is not at hand."""
    dry_run_steps: int = 0
    """Steps that a dry run also trains, on the run's own ranks, devices and data, to print their time and memory; they
    are not saved. 0 or at least 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dry_run(self.dry_run, self.dry_run_shape, self.dry_run_steps)


def dry_run(config: TrainConfig, options: Options) -> None:
    """Print what the run will need, by arithmetic and, if asked for, by a few steps of it."""
    from megatron_multiverse.training.memory_report import report, shape_to_try
    from megatron_multiverse.training.trial import try_steps

    steps = options.dry_run_steps
    # Before the ranks meet: the report makes process groups of its own. One of them speaks for all.
    lines = report(config, shape_to_try(config, options.dry_run_shape))
    speaks = os.environ.get("RANK", "0") == "0"
    if speaks:
        print(lines, flush=True)
    if steps:
        lines = try_steps(config, steps)
        if speaks:
            print(lines)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    options = parse_options(Options)
    config = narrowed(options, TrainConfig)
    if options.dry_run:
        dry_run(config, options)
        return
    from megatron_multiverse.training.signals import EXIT_CODE_STOPPED, StopSignals

    # To the end of the process: neither a signal before the first step nor one after the last save may kill it.
    stop = StopSignals()
    stop.__enter__()
    from megatron_multiverse.training.trainer import train

    observe = None
    if config.eval_prompts:
        from megatron_multiverse.evaluation.free_running import FreeRunning

        observe = FreeRunning(config)
    result = train(config, stop=stop, observe=observe)
    sys.exit(EXIT_CODE_STOPPED if result.stopped_by is not None else 0)


if __name__ == "__main__":  # loader workers import this file where processes are spawned
    run_tool(main)
