"""A few real steps of a run that are forgotten: what they take, before the run itself (`--dry-run --dry-run-steps`)."""

from __future__ import annotations

import time

from megatron_multiverse.config import TrainConfig
from megatron_multiverse.training.data import build_loaders, open_tokenizer
from megatron_multiverse.training.metrics import (
    MetricsWriter,
    StepMeter,
    format_duration,
    format_loss,
    format_mfu,
    format_speed,
)
from megatron_multiverse.training.microbatches import streaming
from megatron_multiverse.training.seeds import seed_everything
from megatron_multiverse.training.start import describe_model, joined_groups
from megatron_multiverse.training.trainer import build_engine, check_agreement


def try_steps(config: TrainConfig, steps: int) -> str:
    """Train the first steps of a run, whatever its folder holds, and save nothing.

    Args:
        config: the run. All its ranks call this, under torchrun or srun.
        steps: at least 2. In the first one kernels are compiled and buffers made, so it is not timed.

    Returns:
        A line on time, loss and the memory of the fullest rank, on every rank.

    Raises:
        ConfigError: see `trainer.train`.
        TrainingError: the loss or the gradient is not finite, or a document cannot be read.
    """
    model_config = describe_model(config)
    tokenizer = open_tokenizer(config, model_config.vocab_size)
    with joined_groups(config) as ranks:
        seed_everything(config.seed)
        loader, valid_loader = build_loaders(config, tokenizer)
        check_agreement(config, loader, ranks)
        engine = build_engine(config, model_config, loader, valid_loader)
        meter, started = StepMeter(engine.device, engine.clock, ranks.size), time.perf_counter()
        with engine.running(), streaming(loader) as batches:
            for number in range(steps):
                result = engine.step([next(batches) for _ in range(config.num_microbatches)])
                if number == 0:
                    first_loss = float(result.loss)  # waits for the device
                    first_s = time.perf_counter() - started
                    meter.reset()
                else:
                    meter.add(
                        result.loss_sum, result.loss_tokens, result.tokens, result.visible_pairs, result.grad_norm
                    )
            numbers = meter.read(model_config, engine.peak_tflops)
        engine.check(MetricsWriter(None, config.train_iters))
        memory = max(float(gib or 0.0) for gib in ranks.gather(numbers["memory_gib"]))
    step_s = numbers["step_time_s"] or 0.0
    return (
        f"tried {steps} steps: loss {format_loss(first_loss)} in the first, which took {first_s:.1f} s; {step_s:.3g} s "
        f"for each other one, {format_speed(numbers)}, "
        f"MFU {format_mfu(numbers['mfu'])}, {memory:.2f} GiB on the fullest rank; "
        f"all {config.train_iters} steps would take {format_duration(step_s * config.train_iters)} without validation "
        "and checkpoints"
    )
