"""Soak test of the server on this machine: random clients, broken bodies, a small cache, a killed engine.

Example:
    python tools/dev/soak_server.py --seconds 240 --output runs/soak.json

Everything talks to 127.0.0.1 and ends after the given time. Exit status 1 if anything did not
hold; the report says what.
"""

from __future__ import annotations

import asyncio
import json
import sys

from megatron_multiverse.cli import parse_options, run_tool


def main() -> None:
    from megatron_multiverse.clients.soak import SoakConfig, soak

    config = parse_options(SoakConfig)
    report = asyncio.run(soak(config))
    text = json.dumps(report, indent=1)
    print(text)
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(text + "\n", encoding="utf-8")
    if not report["ok"]:
        sys.exit("not all held; see the report")


if __name__ == "__main__":
    run_tool(main)
