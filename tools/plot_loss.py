"""Loss curves of one or more runs, from their metrics.jsonl, as a PNG.

Example:
    python tools/plot_loss.py --runs runs/a runs/b --output loss.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_multiverse.errors import MultiverseError


def main() -> None:
    from jsonargparse import ArgumentParser

    from megatron_multiverse.views.loss_curves import plot_loss

    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="run folders (checkpoint.save)")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="PNG to write")
    parser.add_argument("--smooth", type=int, default=1, help="running mean over this many log lines")
    parser.add_argument("--log_scale", action="store_true", help="logarithmic loss axis")
    options = parser.parse_args()
    try:
        plot_loss(options.runs, options.output, smooth=options.smooth, log_scale=options.log_scale)
    except MultiverseError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
