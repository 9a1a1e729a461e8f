"""Curves of one or more runs of reinforcement learning, from their metrics.jsonl, as a picture.

Example:
    python tools/plot_rl.py --runs runs/rl/run --output rl.png --smooth 5
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw rewards, lengths, parallelism and updates of one or more runs."""

    runs: list[str] = field(default_factory=list)
    """Run folders (checkpoint.save)."""
    output: str = "rl.png"
    """Picture to write: .png, .pdf, .svg and what else matplotlib can draw."""
    smooth: int = 1
    """Running mean over this many steps."""


def main() -> None:
    options = parse_options(Options)
    from megatron_multiverse.views.rl_curves import plot_rl

    if not options.runs:
        raise ConfigError("--runs is missing: name one or more run folders")
    plot_rl([Path(run) for run in options.runs], Path(options.output), smooth=options.smooth)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run_tool(main)
