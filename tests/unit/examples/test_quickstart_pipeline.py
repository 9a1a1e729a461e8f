"""The parts of the quickstart's training side that need no training."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from megatron_multiverse.cli import parse_options
from megatron_multiverse.config import TrainConfig

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import pipeline  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402


def test_a_failing_tool_stops_the_pipeline(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"preprocess_data\.py ended with exit code"):
        pipeline.tool("tools/preprocess_data.py", "--input", "none.jsonl")
    assert "$ python tools/preprocess_data.py --input none.jsonl" in capfd.readouterr().out


def test_a_failing_tool_in_the_background_names_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = pytest.raises(RuntimeError, match=r"plot_loss\.py ended with exit code 1; its message stands in .*log")
    with (tmp_path / "log").open("w", encoding="utf-8") as log, told:
        pipeline.tool("tools/plot_loss.py", "--runs", "none", log=log)
    command, message = (tmp_path / "log").read_text(encoding="utf-8").split("\n", 2)[1:]
    assert command == "$ python tools/plot_loss.py --runs none" and message.startswith("error: ")
    assert capfd.readouterr() == ("", "")


def test_only_folders_of_the_quickstart_are_emptied(tmp_path: Path) -> None:
    folder = tmp_path / "training"
    pipeline.empty(folder)
    (folder / "rows.jsonl").touch()
    pipeline.empty(folder)
    assert not (folder / "rows.jsonl").exists()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").touch()
    with pytest.raises(RuntimeError, match="own was not made by the quickstart"):
        pipeline.empty(tmp_path / "own")
    assert (tmp_path / "own" / "thesis.tex").exists()


def test_folders_with_blanks_go_through_every_stage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my runs, [1]"
    pipeline.prepare(folder, train_rows=30, held_out_rows=5)
    pipeline.train(folder, folder / "run 1", 11)
    assert sorted(pipeline.losses(folder / "run 1")) == [10, 11]
    assert pipeline.same_weights(folder / "run 1" / "iter_0000011", folder / "run 1" / "model")
    assert not pipeline.same_weights(folder / "run 1" / "model", altered(folder / "run 1" / "model"))
    echoed = [line[2:] for line in capfd.readouterr().out.splitlines() if line.startswith("$ ")]
    assert len(echoed) == 5
    assert any(word == str(folder / "data/train") for word in shlex.split(echoed[1]))  # can be pasted into a shell


def altered(model: Path) -> Path:
    """A copy of a model folder in which the last bit of the last weight is another, without the checksums of it."""
    copy = shutil.copytree(model, model.with_name("altered"), ignore=shutil.ignore_patterns("checksums.json"))
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-4] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    return copy


GOOD = {
    "parallel_equals_sequential": True, "accuracy": 1.0, "accuracy_sequential": 1.0, "accuracy_autoregressive": 0.98,
    "max_abs_logit_difference": 1.9e-5, "resume_bit_exact": True, "loss_first": 5.0, "loss_last": 1.0,
    "logit_rows_compared": 1, "larger_problems": 8, "accuracy_6_expressions": 1.0,
    "accuracy_8_expressions": 0.75, "accuracy_depth_3": 0.875,
}  # fmt: skip


def test_good_figures_pass_with_and_without_the_training_run() -> None:
    assert report.shortfalls(GOOD) == []
    assert report.shortfalls({k: v for k, v in GOOD.items() if not k.startswith(("loss", "resume"))}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel_equals_sequential": False}, "one branch at a time differ"),
        ({"accuracy": 0.97}, "accuracy is 0.970"),
        ({"accuracy_sequential": 0.5}, "accuracy_sequential is 0.500"),
        ({"accuracy_autoregressive": float("nan")}, "accuracy_autoregressive is nan"),
        ({"accuracy_6_expressions": 0.625}, "62% of problems with 6 expressions are right, at least 75%"),
        ({"accuracy_8_expressions": float("nan")}, "nan% of problems with 8 expressions are right"),
        ({"accuracy_depth_3": 0.0}, "0% of problems with 2 or 3 expressions of depth 3 are right"),
        ({"max_abs_logit_difference": 1e-3}, "decode logits differ"),
        ({"max_abs_logit_difference": float("nan")}, "decode logits differ"),
        ({"resume_bit_exact": False}, "the resumed training run differs"),
        ({"loss_last": 5.0}, "did not fall: 5.000 -> 5.000"),
        ({"loss_last": float("nan")}, "did not fall"),
    ],
)
def test_each_figure_that_falls_short_ends_the_quickstart_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    figures = GOOD | change | {"train_iters": 300}
    training = {name: figures.pop(name) for name in ("resume_bit_exact", "loss_first", "loss_last", "train_iters")}
    monkeypatch.setattr(run, "decode_and_measure", lambda options, started: (figures, dict))
    monkeypatch.setattr(pipeline, "run_pipeline", lambda folder, train_iters, meanwhile: training)
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run.main()
    assert (tmp_path / "report.json").is_file()


def test_losses_are_read_from_training_lines_only(tmp_path: Path) -> None:
    lines = [
        '{"kind": "start", "step": 0}',
        '{"kind": "train", "step": 10, "loss": 2.5}',
        '{"kind": "end", "step": 10}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert pipeline.losses(tmp_path) == {10: 2.5}


def test_training_configurations_are_valid_and_fit_the_model() -> None:
    gpu = parse_options(TrainConfig, ["--config", str(QUICKSTART / "train.yaml")])
    cpu = parse_options(TrainConfig, ["--config", str(QUICKSTART / "tiny_cpu.yaml"), "--data.data_prefixes=[x]"])
    assert gpu.model is not None and cpu.model is not None
    assert (QUICKSTART / "model" / "model.safetensors").stat().st_size <= 8_000_000
    assert 2 * gpu.model.num_parameters <= (QUICKSTART / "model" / "model.safetensors").stat().st_size
    assert cpu.model.num_parameters < 500_000
