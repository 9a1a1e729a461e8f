"""Asking the Hugging Face hub without a long wait where nobody can answer.

The libraries of Hugging Face try again for half a minute and more, also where a name cannot be resolved or a connection
is refused, as on machines without a network. Here one look at the address tells, before they are called. Where the
answer is only slow to come, they go on with their own patience.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

_SAY_AFTER_S = 2.0
_PAUSE_S = 1.0


@contextlib.contextmanager
def asking_hub() -> Iterator[str]:
    """Within, the libraries of Hugging Face ask the hub, or take what is in its cache where it cannot be reached.

    Yields:
        Why the hub is not asked, for the error if the cache has not got it; empty where it is asked.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield "HF_HUB_OFFLINE is set"
        return
    why = _unreachable(constants.ENDPOINT, float(constants.HF_HUB_ETAG_TIMEOUT))
    if not why:
        yield ""
        return
    # What each library calls it; datasets reads its own copy, if it is there at all.
    switches = [(constants, "HF_HUB_OFFLINE"), (sys.modules.get("datasets.config"), "HF_HUB_OFFLINE")]
    before = [(module, name, getattr(module, name)) for module, name in switches if hasattr(module, name)]
    for module, name, _ in before:
        setattr(module, name, True)
    try:
        yield why
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@functools.cache
def _unreachable(endpoint: str, timeout: float) -> str:
    """Why nobody can be reached at this address; empty where somebody can, and where that cannot be told."""
    parts = urlsplit(endpoint)
    host, scheme = parts.hostname, parts.scheme
    proxies = urllib.request.getproxies()
    if host is None or ((scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(host)):
        return ""  # the proxy resolves and connects
    line = f"waiting for {host} ... (HF_HUB_OFFLINE=1 takes what was fetched before, without asking)"
    said = threading.Timer(_SAY_AFTER_S, logger.warning, (line,))
    said.daemon = True
    said.start()
    try:
        for pause in (_PAUSE_S, 0.0):  # a name may be resolved at the second try
            try:
                _connect(host, parts.port or (443 if scheme == "https" else 80), timeout)
                return ""
            except TimeoutError:
                return ""
            except OSError as error:
                why = f"{host} cannot be reached ({error.strerror or error})"
                time.sleep(pause)
    finally:
        said.cancel()
    logger.warning("%s: taking what was fetched before, if it is there", why)
    return why


def _connect(host: str, port: int, timeout: float) -> None:
    """Connect to the first address that takes it.

    Raises:
        TimeoutError: one does not answer in time; the others are not tried.
        OSError: the name has no address, or all refuse.
    """
    problem: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as connection:
            connection.settimeout(timeout)
            try:
                return connection.connect(address)
            except TimeoutError:
                raise
            except OSError as error:
                problem = error
    raise problem or OSError("no address")
