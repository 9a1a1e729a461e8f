"""One server for all tests that do not change it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.server.running import Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as started:
        yield started
