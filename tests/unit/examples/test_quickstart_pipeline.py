"""The parts of the quickstart's training side that need no training."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from megatron_multiverse.config import TrainConfig

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import pipeline  # noqa: E402


def test_a_failing_tool_stops_the_pipeline(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"preprocess_data\.py ended with exit code"):
        pipeline.tool("tools/preprocess_data.py", "--input", "none.jsonl")
    assert "$ python tools/preprocess_data.py --input none.jsonl" in capfd.readouterr().out


def test_folders_with_blanks_go_through_every_stage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my runs, [1]"
    pipeline.prepare(folder, train_rows=30, held_out_rows=5)
    pipeline.train(folder, folder / "run 1", 11)
    assert sorted(pipeline.losses(folder / "run 1")) == [10, 11]
    assert (folder / "run 1" / "model" / "model.safetensors").is_file()
    echoed = [line[2:] for line in capfd.readouterr().out.splitlines() if line.startswith("$ ")]
    assert len(echoed) == 5
    assert any(word == str(folder / "data/train") for word in shlex.split(echoed[1]))  # can be pasted into a shell


def test_losses_are_read_from_training_lines_only(tmp_path: Path) -> None:
    lines = [
        '{"kind": "start", "step": 0}',
        '{"kind": "train", "step": 10, "loss": 2.5}',
        '{"kind": "end", "step": 10}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert pipeline.losses(tmp_path) == {10: 2.5}


def test_training_configurations_are_valid_and_fit_the_model() -> None:
    gpu = TrainConfig.from_yaml(QUICKSTART / "train.yaml")
    cpu = TrainConfig.from_yaml(QUICKSTART / "tiny_cpu.yaml", {"data.data_prefixes": ["x"]})
    assert gpu.model is not None and cpu.model is not None
    assert (QUICKSTART / "model" / "model.safetensors").stat().st_size <= 8_000_000
    assert 2 * gpu.model.num_parameters <= (QUICKSTART / "model" / "model.safetensors").stat().st_size
    assert cpu.model.num_parameters < 500_000
