"""Serves a model over HTTP: Megatron's PUT /api, OpenAI's /v1/..., and a page that shows branches side by side.

Example:
    python tools/run_text_generation_server.py --load examples/quickstart/model --port 5000
    curl http://127.0.0.1:5000/v1/completions -d '{"prompt": "Work out A = 583 + 967.", "max_tokens": 600}'

docs/serving.md has all routes, fields and limits. SIGTERM (or Ctrl-C) lets running answers finish; a second one ends
them.
"""

from __future__ import annotations

import logging
import sys

from megatron_multiverse.cli import parse_options, run_tool


def main() -> None:
    from megatron_multiverse.server.config import ServerConfig

    config = parse_options(ServerConfig)
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    from megatron_multiverse.server.start import serve

    serve(config)


if __name__ == "__main__":
    run_tool(main)
