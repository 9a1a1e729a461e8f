"""Small files that are whole or not there: readers see the old or the new content, never half of it.

And errors that name their file, and locks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_LFS_POINTER = b"version https://git-lfs"


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replace the content of a file; it is on the disk when this returns.

    Args:
        path: the file; its folder must exist.
        text: its new content, written as UTF-8.

    Raises:
        OSError: the file cannot be written; the old content stands.
    """
    path = Path(path)
    # The process id keeps apart processes that write the same file, e.g. a worker that outlives its killed parent.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with naming(path):
            partial.write_text(text, encoding="utf-8")
            flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether git left a pointer here in place of a large file that was not fetched."""
    with open(path, "rb") as stream:
        return stream.read(len(_LFS_POINTER)) == _LFS_POINTER


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two names stand for one file, which need not be there yet. Terminals and such hold nothing to lose."""
    if one.exists() and other.exists():
        return one.samefile(other) and not other.is_char_device()
    return one.absolute() == other.absolute()


def save_figure(figure: Figure, path: str | Path, *, dpi: int) -> None:
    """Write a figure of matplotlib in the format of the file's name (PNG without one), in a folder made if need be.

    Its texts are shown as they are: tokens and names with dollars in them are no formulas, but for the numbers that
    matplotlib itself writes at logarithmic axes. Characters that its font lacks are boxes. The figure is closed.

    Args:
        figure: made by `matplotlib.pyplot`.
        path: the file.
        dpi: dots per inch.

    Raises:
        OSError: the file cannot be written; the old content stands.
    """
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if "$" in text.get_text() and r"\mathdefault" not in text.get_text():
            text.set_parse_math(False)
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph .* missing from")
                figure.savefig(partial, dpi=dpi, format=path.suffix[1:] or "png")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
            plt.close(figure)


def write_json_atomic(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """`write_text_atomic` of a JSON value and a final newline."""
    write_text_atomic(path, json.dumps(value, indent=indent) + "\n")


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file, as its newlines end them. `str.splitlines` would end them at characters such as U+2028
    too, which texts hold and JSON leaves as they are."""
    with Path(path).open(encoding="utf-8") as stream:
        return [line.removesuffix("\n") for line in stream]


def write_line(stream: IO[str], text: str) -> None:
    """Append a line to an open file at once. Raises OSError, which names the file."""
    with naming(stream.name):
        stream.write(text + "\n")
        stream.flush()


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError within says which file it is about, which those of a full disk do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def try_lock(file: IO[str]) -> bool:
    """Lock an open file for this process, without waiting; closing the file gives the lock back.

    Returns:
        False if another process holds it. Where the file system has no locks a warning says so, and it is True.

    Raises:
        OSError: it cannot be locked for another reason.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        logger.warning("%s cannot be locked (%s): start only one run there", file.name, error.strerror)
    return True


def flush(path: str | Path) -> None:
    """Push a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
