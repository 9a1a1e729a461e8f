"""A server that says what a test tells it to, one thing after the other."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Said = tuple[int, Any]
"""Status and body of an answer: text, or what becomes JSON."""


@dataclass
class Scripted:
    """A server that says, at each route, one thing after the other, and the last one from then on."""

    url: str
    script: dict[str, list[Said]]
    asked: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def scripted_server() -> Iterator[Scripted]:
    """One that runs inside the block; it says nothing before it has a script."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            said = scripted.script.get(self.path, [(404, {"error": {"message": "no such route"}})])
            status, body = said[min(scripted.asked[self.path], len(said) - 1)]
            scripted.asked[self.path] += 1
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.send_header("retry-after", "0")
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    scripted = Scripted(f"http://127.0.0.1:{http.server_port}", {})
    try:
        yield scripted
    finally:
        http.shutdown()
        http.server_close()
