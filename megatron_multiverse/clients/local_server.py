"""A server of our own on this machine, for what tests and measures servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from megatron_multiverse.errors import GenerationError

TOOL = Path(__file__).parents[2] / "tools" / "run_text_generation_server.py"
SECONDS_TO_END = 90


@contextlib.asynccontextmanager
async def local_server(options: Mapping[str, Any]) -> AsyncIterator[tuple[str, psutil.Process]]:
    """Start tools/run_text_generation_server.py at a free loopback port; at the end of the block it gets SIGTERM.

    Args:
        options: of the tool, without the dashes before their names.

    Yields:
        Its base URL, once it is ready, and its process.

    Raises:
        GenerationError: it did not start, or did not end in order; the message has what it said.
    """
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(TOOL),
        *("--port", "0"),
        *words,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )
    assert process.stderr is not None
    try:
        url = await _ready(process.stderr)
        reading = asyncio.create_task(_drop(process.stderr))
        yield url, psutil.Process(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(SECONDS_TO_END):
                code = await process.wait()
        except TimeoutError:
            process.kill()
            raise GenerationError("the server did not end after SIGTERM") from None
    reading.cancel()
    if code != 0:
        raise GenerationError(f"the server ended with status {code} after SIGTERM")


async def _ready(log: asyncio.StreamReader) -> str:
    url, lines = "", list[str]()
    while not url or "ready:" not in lines[-1]:
        lines.append((await log.readline()).decode())
        if not lines[-1]:
            raise GenerationError("the server did not start: " + "".join(lines))
        if found := re.search(r"listening at (http://\S+)", lines[-1]):
            url = found[1]
    return url


async def _drop(log: asyncio.StreamReader) -> None:
    while await log.read(65536):
        pass
