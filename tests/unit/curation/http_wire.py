"""HTTP/1.1 as far as the server of the tests needs it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any


async def read_request(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str], bytes] | None:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return method, path, headers, body


def head(status: int, kind: str, length: int | None, more: Mapping[str, str] | None = None) -> bytes:
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", size, "request-id: req_1"]
    lines += [f"{name}: {value}" for name, value in (more or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def send(
    writer: asyncio.StreamWriter, status: int, data: bytes, kind: str, more: Mapping[str, str] | None = None
) -> bool:
    writer.write(head(status, kind, len(data), more) + data)
    await writer.drain()
    return True


async def send_json(writer: asyncio.StreamWriter, status: int, value: Any) -> bool:
    return await send(writer, status, json.dumps(value).encode(), "application/json")


async def send_error(
    writer: asyncio.StreamWriter, status: int, kind: str, message: str, more: Mapping[str, str] | None = None
) -> bool:
    value = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
    return await send(writer, status, json.dumps(value).encode(), "application/json", more)
