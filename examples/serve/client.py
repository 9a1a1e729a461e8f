"""Waits until a server is ready, then asks it something with the OpenAI SDK.

Example:
    python examples/serve/client.py multiverse-server-1234

The folder is the one that serve.sbatch makes: it holds the address and the key of the server.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import httpx2
import openai

PROMPT = "Work out A = 583 + 967; B = 48 + 76. Think step by step and in parallel before answering."


def wait_until_ready(url: str, seconds: float = 1800.0) -> None:
    """Models take minutes to load; meanwhile the port is closed or the server answers 503."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/health/ready").status_code == 200:
                return
        time.sleep(2)
    sys.exit(f"{url} was not ready within {seconds:g} seconds; its log says why")


def main() -> None:
    folder = Path(sys.argv[1])
    url, key = (folder / "url").read_text().strip(), (folder / "key").read_text().strip()
    wait_until_ready(url)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    answer = client.completions.create(model="EMPTY", prompt=PROMPT, max_tokens=700, temperature=0)
    print(answer.choices[0].text)


if __name__ == "__main__":
    main()
