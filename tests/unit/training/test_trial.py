"""The steps of a dry run are those of the run, and leave nothing behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_multiverse.training.trainer import train
from megatron_multiverse.training.trial import try_steps
from tests.forked import run_forked
from tests.unit.checkpoints.hf_folders import save_hf_model, save_tokenizer
from tests.unit.training.test_start import preprocess, run_config

SCRIPT = Path(__file__).parents[3] / "pretrain_scripts/sft_multiverse.py"


def test_tried_steps_are_the_first_of_the_run_and_leave_no_trace(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    save_tokenizer(tmp_path / "model")
    prefix, run = preprocess(tmp_path, tmp_path / "model"), tmp_path / "run"
    config = run_config(
        run, prefix, tmp_path / "model", init_from=str(tmp_path / "model"), add_control_tokens=True, train_iters=9000,
        log={"log_interval": 1, "peak_tflops": 0.5},
    )  # fmt: skip
    said = try_steps(config, 3)
    assert not run.exists()
    found = re.fullmatch(
        r"tried 3 steps: loss ([\d.]+) in the first, which took [\d.]+ s; ([\d.e-]+) s for each other one, \d+ "
        r"tokens/s, MFU [\d.]+ %, ([\d.]+) GiB on the fullest rank; all 9000 steps would take (\d+):(\d\d):(\d\d) .*",
        said,
    )
    assert found and 0 < float(found[3]) < 100
    hours, minutes, seconds = (int(part) for part in found.groups()[3:])
    assert abs(3600 * hours + 60 * minutes + seconds - 9000 * float(found[2])) < 0.01 * 9000 * float(found[2]) + 1
    train(run_config(run, prefix, tmp_path / "model", init_from=str(tmp_path / "model"), add_control_tokens=True,
                     log={"log_interval": 1}))  # fmt: skip
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    first = next(line for line in lines if line["kind"] == "train")
    assert f"{first['loss']:.4f}" == found[1]


def test_a_trial_that_would_say_nothing_is_refused() -> None:
    config = SCRIPT.parent / "configs/tiny_cpu.yaml"

    def refused(*flags: str) -> str:
        done = run_forked(SCRIPT, "--config", config, *flags)
        assert done.returncode == 1 and done.stdout == ""
        return done.stderr

    assert "at least 2, since the first step is not timed, got 1" in refused("--dry-run", "--dry-run-steps", "1")
    assert "no effect without --dry-run" in refused("--dry-run-steps", "2")
    shape = refused("--dry-run", "--dry-run-steps", "2", "--dry-run-shape", "qwen2.5-32b")
    assert "gives the shape alone: leave one of them out" in shape
