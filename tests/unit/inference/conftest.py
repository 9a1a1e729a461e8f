from __future__ import annotations

import pytest

from . import toy


@pytest.fixture(params=[False, True], ids=["in_turn", "overlapped"])
def overlap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy engines plan each step after the one before it has run, or while it runs."""
    monkeypatch.setattr(toy, "OVERLAP", request.param)
