"""A chat with a server in the terminal; branches grow side by side.

Example:
    python tools/text_generation_cli.py --url http://127.0.0.1:5000
    python tools/text_generation_cli.py --prompt "Work out A = 583 + 967; B = 48 + 76."

Needs a server of this project: tools/run_text_generation_server.py. Where the output is no terminal, each line is
printed after the name of its branch.
"""

from __future__ import annotations

import asyncio

from megatron_multiverse.cli import parse_options, run_tool


def main() -> None:
    from megatron_multiverse.clients.chat import ChatConfig, converse

    asyncio.run(converse(parse_options(ChatConfig)))


if __name__ == "__main__":
    run_tool(main)
