"""What this package starts ends with the process that started it, also when that one is killed without warning."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # prctl(2): the signal that this process gets when the one that forked it dies
_prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None
_POLL_S = 1.0


def end_with_parent(parent: int) -> None:
    """Call this in a child process: it is killed when its parent dies.

    The kernel sees to it on Linux; elsewhere a thread looks once a second.

    Args:
        parent: process id of the parent, which may have died already.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it died before the lines above
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)
