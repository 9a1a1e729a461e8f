"""What the dry runs of both training scripts share of their options."""

from __future__ import annotations

from megatron_multiverse.errors import ConfigError


def check_dry_run(dry_run: bool, shape: str | None, steps: int) -> None:
    """Refuse options of a dry run that have no effect or do not go together.

    Args:
        dry_run: whether there is one.
        shape: `dry_run_shape`, a published shape in place of the run's model.
        steps: `dry_run_steps`, steps that it also takes.

    Raises:
        ConfigError: the message says what to leave out.
    """
    if steps < 0 or steps == 1:
        raise ConfigError(f"dry_run_steps must be 0 or at least 2, since the first step is not timed, got {steps}")
    if steps and not dry_run:
        raise ConfigError(f"dry_run_steps {steps} has no effect without --dry-run: set both or neither")
    if shape is not None and not dry_run:
        raise ConfigError(f"dry_run_shape {shape} has no effect without --dry-run: set both or neither")
    if steps and shape is not None:
        raise ConfigError(
            f"dry_run_steps {steps} trains the model of the config itself, of which dry_run_shape ({shape}) gives "
            "the shape alone: leave one of them out"
        )
