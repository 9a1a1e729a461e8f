"""Large files written from start to end, past the page cache and with their checksum.

Writing through the page cache takes memory for gigabytes that nobody reads again soon, and the kernel then stops the
writer to make room: on a machine with little free memory that is several times as slow as the disk. So whole pieces go
straight to the disk (O_DIRECT), from a thread, while the caller makes the next one. Where a file system has no such
writes they go through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from megatron_multiverse.files import naming

logger = logging.getLogger(__name__)

_PIECE = 16 << 20  # a multiple of every disk's block; its memory is aligned because mmap gives whole pages
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only


class LargeFile:
    """A new file that is written in order; leave the `with` block, or call `close`, to put it on the disk whole.

    Args:
        path: the file; one that exists is replaced.

    Raises:
        OSError: the file cannot be written; it may be `write` or `close` that hears of it.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._descriptor = _open(path)
        self._thread = ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None
        self._buffers = [memoryview(mmap.mmap(-1, _PIECE)) for _ in range(2)]
        self._used = 0
        self._size = 0
        self._digest = xxhash.xxh3_64()

    def write(self, data: Any) -> int:
        """Append bytes (any contiguous buffer); returns their number."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            count = min(len(view) - done, _PIECE - self._used)
            self._buffers[0][self._used : self._used + count] = view[done : done + count]
            self._used += count
            done += count
            if self._used == _PIECE:
                self._send()
        self._size += done
        return done

    def tell(self) -> int:
        """Number of bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Nothing: bytes leave in whole pieces. Writers of archives call it."""

    def close(self) -> None:
        """Write what is left and push the file to the disk."""
        if self._descriptor < 0:
            return
        try:
            self._wait()
            _without_direct(self._descriptor)  # the rest is no whole piece
            self._put(self._buffers[0][: self._used])
            with naming(self._path):
                os.fsync(self._descriptor)
        finally:
            self._release()

    @property
    def checksum(self) -> str:
        """XXH3 hash of a closed file's content, as `checksums.checksum` gives it."""
        assert self._descriptor < 0
        return self._digest.hexdigest()

    def _send(self) -> None:
        """Hand the full buffer to the thread, once it is done with the other one."""
        self._wait()
        self._under_way = self._thread.submit(self._put, self._buffers[0][: self._used])
        self._buffers.reverse()
        self._used = 0

    def _wait(self) -> None:
        if self._under_way is not None:
            self._under_way.result()

    def _put(self, data: memoryview) -> None:
        self._digest.update(data)
        with naming(self._path):
            self._write(data)

    def _write(self, data: memoryview) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not _without_direct(self._descriptor):
                    raise

    def _release(self) -> None:
        self._thread.shutdown()
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> LargeFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._descriptor >= 0:
            self._release()


def _open(path: str | Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        logger.info("%s: this file system cannot be written past the page cache (%s)", path, error.strerror)
        return os.open(path, flags, 0o666)


def _without_direct(descriptor: int) -> bool:
    """Let further writes go through the cache; says whether they did not before."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)
