"""Loss curves of one or more runs, from their metrics.jsonl, as a picture.

Example:
    python tools/plot_loss.py --runs runs/a runs/b --output loss.png --smooth 10 --log-scale
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw the loss curves of one or more runs."""

    runs: list[str] = field(default_factory=list)
    """Run folders (checkpoint.save)."""
    output: str = "loss.png"
    """Picture to write: .png, .pdf, .svg and what else matplotlib can draw."""
    smooth: int = 1
    """Running mean over this many log lines."""
    log_scale: bool = False
    """Logarithmic loss axis."""


def main() -> None:
    options = parse_options(Options)
    from megatron_multiverse.views.loss_curves import plot_loss

    if not options.runs:
        raise ConfigError("--runs is missing: name one or more run folders")
    folders, output = [Path(run) for run in options.runs], Path(options.output)
    plot_loss(folders, output, smooth=options.smooth, log_scale=options.log_scale)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run_tool(main)
