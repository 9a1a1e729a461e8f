"""What a benchmark knows of its parts after torchrun has started it again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.attempts import BROKE_OFF, OUT_OF_MEMORY, Attempts
from megatron_multiverse.parallel.ranks import Ranks


def end_in(name: str, error: BaseException, folder: Path) -> None:
    with pytest.raises(type(error)), Attempts(Ranks(), folder).part(name):
        raise error


def test_a_new_process_knows_what_became_of_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this run")
    first = Attempts(Ranks(), tmp_path)
    assert first.outcome("small") is None
    with first.part("small") as noted:
        noted["losses"] = [1.5]
    end_in("large", torch.cuda.OutOfMemoryError("no"), tmp_path)
    end_in("odd", ValueError("no"), tmp_path)
    again = Attempts(Ranks(), tmp_path)
    outcomes = {name: again.outcome(name) for name in ("small", "large", "odd", "later")}
    assert outcomes == {"small": {"losses": [1.5]}, "large": OUT_OF_MEMORY, "odd": BROKE_OFF, "later": None}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another run")
    assert Attempts(Ranks(), tmp_path).outcome("small") is None
    again.forget()
    assert not list(tmp_path.iterdir())
