"""Kept answers in the terminal."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path

import pytest

from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.inference import to_record
from megatron_multiverse.views.rollouts import read_records, segments, table
from tests.unit.inference.toy import ScriptedSampler, ToyModel, ask, random_script, toy_engine, toy_text


class Toy:
    """A tokenizer of the toy vocabulary."""

    detokenize = staticmethod(toy_text)


def test_answers_are_listed_and_shown_segment_by_segment(tmp_path: Path) -> None:

    script = random_script(random.Random(3), depth=1, blocks=1, most_paths=3)
    engine = toy_engine(ToyModel(), sampler=ScriptedSampler([script]))
    (result,) = engine.generate([ask([30, 31], max_tokens=2000)])
    records = [
        {"step": 4, "reward": 1.25, "advantage": -0.5, "prompt": "why\u2028?", **to_record(result)},
        to_record(result),
    ]
    file = tmp_path / "rollouts.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]  # as `write_records` has them
    file.write_text("".join(lines), encoding="utf-8")
    head, first, second = table(read_records(file))
    assert head.split()[:4] == ["line", "step", "reward", "advantage"] and head.split()[-1] == "prompt"
    assert first.split()[:4] == ["1", "4", "1.250", "-0.500"] and first.endswith("why ?")
    assert second.split()[:2] == ["2", str(len(result.blocks))]
    shown = "\n".join(segments(records[0], Toy()))  # type: ignore[arg-type]
    assert shown.startswith("-- root:") and "    -- 1: " in shown and "weights 0" in shown
    assert "".join(shown.split()).count("<Path>") == len(result.blocks[0].branches)
    file.write_text(file.read_text()[:-20], encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        read_records(file)
    with pytest.raises(ConfigError, match="no such file"):
        read_records(tmp_path / "none")
    with pytest.raises(ConfigError, match=": a folder; name rollouts"):
        read_records(tmp_path)


def test_a_picture_of_no_answer_is_refused() -> None:
    options = importlib.import_module("tools.show_rollouts").Options
    with pytest.raises(ConfigError, match=r"--timeline t\.png draws one answer: name it with --line 1"):
        options(input=Path("rollouts.jsonl"), timeline=Path("t.png"))
    assert options(input=Path("rollouts.jsonl"), timeline=Path("t.png"), line=2).line == 2
