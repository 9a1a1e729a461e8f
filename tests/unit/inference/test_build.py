"""The example of docs/engine.md runs as it is written, and an engine sizes its cache by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_multiverse.config import EngineConfig

from .toy import ToyModel, ask, toy_engine

ROOT = Path(__file__).parents[3]


def test_the_example_answers_in_parallel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "engine.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    exec(example, names)
    shown = capsys.readouterr().out
    assert "<Path>" in shown and "</Conclusion>" in shown
    engine, result = names["engine"], names["result"]
    assert engine.config.num_pages == EngineConfig().pages_for(4096)  # type: ignore[attr-defined]
    assert result.num_parallel > 1  # type: ignore[attr-defined]


def test_a_cache_without_a_size_holds_eight_of_the_longest_answers() -> None:
    engine = toy_engine(ToyModel(), num_pages=0, page_size=16, max_position=320)
    assert engine.book.num_pages == 8 * (20 + 16)
    assert len(engine.generate([ask([30] * 10, max_tokens=300, ignore_eos=True)])[0].token_ids) == 300
