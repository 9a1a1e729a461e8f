"""What travels between the HTTP process and the engine process: msgpack maps, each after its length.

Plain data only. No side ever builds an object from what the other sends, as pickle would.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any

import msgpack

Message = dict[str, Any]
_DECADE = (1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.3, 8)
HEADER = struct.Struct("<I")
_READ_SIZE = 1 << 18
STEP_SECONDS = tuple(round(step * 10.0**power, 6) for power in (-4, -3, -2, -1, 0) for step in _DECADE)
"""Upper bounds of the buckets in which the engine counts its steps; longer ones come last."""


def pack(message: Message) -> bytes:
    """A message as it travels."""
    body = msgpack.packb(message)
    return HEADER.pack(len(body)) + body


def unpack(body: bytes) -> Message:
    """The message of a frame's body."""
    message: Message = msgpack.unpackb(body, strict_map_key=False)  # logit_bias has ids as keys
    return message


class Channel:
    """The engine's end of the socket. Nothing here waits unless it is told to, so no reader stalls a step.

    What the other side is slow to take stays in memory, which the number of unfinished answers bounds.

    Args:
        connection: a connected stream socket; from here on it does not block.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self.closed = False
        """Whether the other side has gone."""

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    @property
    def is_behind(self) -> bool:
        """Whether something waits for the other side to read."""
        return bool(self._outgoing)

    def send(self, message: Message) -> None:
        """Send as much as the other side takes now; the rest goes with later calls of `send` or `flush`."""
        self._outgoing += pack(message)
        self.flush()

    def flush(self) -> None:
        """Send more of what waits."""
        while self._outgoing and not self.closed:
            try:
                sent = self._socket.send(self._outgoing[:_READ_SIZE])
            except BlockingIOError:
                return
            except OSError:
                self.closed = True
                return
            del self._outgoing[:sent]

    def receive(self) -> Iterator[Message]:
        """The messages that have arrived."""
        while not self.closed:
            try:
                data = self._socket.recv(_READ_SIZE)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.closed = True
                break
            self._incoming += data
        start = 0
        while len(self._incoming) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(self._incoming, start)
            end = start + HEADER.size + length
            if len(self._incoming) < end:
                break
            yield unpack(bytes(self._incoming[start + HEADER.size : end]))
            start = end
        del self._incoming[:start]
