"""docs/training.md: its commands on data run as written, its runs begin; commands for GPUs and large models parse."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import training_layouts, training_reshard
from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.cli import parse_options
from megatron_multiverse.config import TrainConfig
from megatron_multiverse.data.preprocess import PreprocessConfig
from pretrain_scripts.sft_multiverse import Options
from tests.forked import run_forked
from tests.unit.test_readme import ROOT, checkout, commands

FOUND = commands((ROOT / "docs/training.md").read_text(encoding="utf-8"))
SCRIPT = "pretrain_scripts/sft_multiverse.py"
__all__ = ["checkout"]


def run(command: str, folder: Path) -> None:
    """Run a line of the document by this interpreter."""
    program, *words = shlex.split(command)
    if program == "python" and not {">", "|"} & {*words}:
        done = run_forked(*words, cwd=folder, timeout=600)
    else:
        line = re.sub(r"^python\b", shlex.quote(sys.executable), command)
        line = re.sub(r"^torchrun\b", f"{shlex.quote(sys.executable)} -m torch.distributed.run", line)
        shell = ["bash", "-c", line]
        done = subprocess.run(shell, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def options_of_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Options]]:
    """Each line that starts the training script, with the options that it means on as many ranks as it says."""
    found = []
    for line in (line for line in FOUND if SCRIPT in line):
        before, _, after = line.partition(SCRIPT)
        ranks = re.search(r"(?:--nproc-per-node |WORLD_SIZE=)(\d+)", before)
        assert ranks is not None, line
        monkeypatch.setenv("WORLD_SIZE", ranks[1])
        found.append((line, parse_options(Options, shlex.split(after))))
    return found


def test_rows_become_data_and_a_run_of_two_processes_begins(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its steps two, where the document trains a hundred."""
    monkeypatch.chdir(checkout)
    prepared = [line for line in FOUND if line.startswith("python ") and "runs/tiny" in line and "plot" not in line]
    assert len(prepared) == 4
    for line in prepared:
        run(line, checkout)
    read = {
        prefix
        for _, config in options_of_runs(monkeypatch)
        if not config.dry_run_shape
        for prefix in config.data.data_prefixes
    }
    assert read == {"runs/tiny/data", "runs/tiny/texts"}
    assert all((checkout / f"{prefix}.idx").is_file() for prefix in read)
    first, plot = (next(line for line in FOUND if name in line) for name in (SCRIPT, "plot_loss"))
    run(f"{first} --train_iters 2 --optim.lr_warmup_iters 1 --log.log_interval 1", checkout)
    rows = [json.loads(line) for line in (checkout / "runs/tiny/checkpoints/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    run(plot, checkout)
    assert (checkout / "runs/tiny/loss.png").is_file()


def test_its_runs_are_what_the_text_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = [config for _, config in options_of_runs(monkeypatch)]
    assert all(isinstance(config, TrainConfig) for config in found)
    tiny, texts, pipeline, zero, looked_at, tried = found
    assert tiny.runs_on == "megatron" and texts.optim.lr_decay_style == "wsd"
    assert pipeline.parallel.pipeline_model_parallel_size == 2
    assert (zero.runs_on, zero.deepspeed.zero_stage) == ("deepspeed", 3)
    assert (looked_at.dry_run, looked_at.dry_run_shape) == (True, "qwen2.5-32b")
    assert (tried.dry_run, tried.dry_run_steps) == (True, 3)


def test_commands_for_gpus_and_large_models_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    parsers = {
        "tools/preprocess_data.py --input data/": PreprocessConfig,
        "tools/convert_checkpoint.py": ConvertConfig,
        "-m benchmarks.training_layouts": training_layouts.Options,
        "-m benchmarks.training_reshard": training_reshard.Options,
    }
    parsed = []
    for line in FOUND:
        for start, options in parsers.items():
            if start in line and (not start.startswith("-m") or line.startswith("torchrun")):
                words = shlex.split(line[line.index(start) :])
                parsed.append(parse_options(options, words[2 if start.startswith("-m") else 1 :]))
    plain, convert, layouts = parsed[1], parsed[2], parsed[3]
    assert [type(options) for options in parsed] == [PreprocessConfig, *parsers.values()]
    assert plain.json_keys == ["question", "deepseek_thinking_trajectory_sequential", "deepseek_attempt"]
    assert (convert.from_, convert.to) == ("mcore", "hf") and layouts.num_layers == 28
    scripts = {line.split()[1] for line in FOUND if line.startswith("sbatch")}
    assert scripts and all((ROOT / script).is_file() for script in scripts)
