"""A model answers freely at each validation, and learns what it would have learnt without."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.config import TrainConfig
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.evaluation.free_running import FreeRunning
from megatron_multiverse.training.trainer import train

EXAMPLE = Path(__file__).parents[3] / "examples/quickstart"


def run_of(folder: Path, name: str, **changes: Any) -> TrainConfig:
    """Two steps of the quickstart's trained model, with a validation after each."""
    data = {"data_prefixes": [str(folder / "set")], "valid_prefixes": [str(folder / "set")], "overlong": "drop"}
    return TrainConfig.from_dict(
        {
            "init_from": str(EXAMPLE / "model"),
            "data": {**data, "tokenizer_model": str(EXAMPLE / "model"), "seq_length": 512, "num_workers": 0},
            "checkpoint": {"save": str(folder / name), "save_interval": 0},
            "optim": {"lr": 1e-6, "lr_decay_style": "constant"},
            "log": {"log_interval": 1},
            **{"train_iters": 2, "eval_interval": 1, "eval_iters": 1, "device": "cpu", **changes},
        }
    )


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind]


def test_answers_stand_beside_the_validation_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ["--output", str(tmp_path / "rows.jsonl"), "--num-rows", "20", "--max-expressions", "2"]
    subprocess.run([sys.executable, str(EXAMPLE / "generate_data.py"), *options], check=True)
    settings = {"tokenizer_model": str(EXAMPLE / "model"), "append_eod": True, "workers": 1}
    preprocess_data(
        PreprocessConfig(input=str(tmp_path / "rows.jsonl"), output_prefix=str(tmp_path / "set"), **settings)
    )
    train(run_of(tmp_path, "without"))
    config = run_of(tmp_path, "with", eval_prompts=2, eval_tokens=2000)
    with caplog.at_level(logging.INFO):
        train(config, observe=FreeRunning(config))
    for kind in ("train", "valid"):
        losses = [[row["loss"] for row in rows(tmp_path / name, kind)] for name in ("with", "without")]
        assert losses[0] == losses[1] and len(losses[0]) == 2
    answers = rows(tmp_path / "with", "answer")
    assert [(row["step"], row["number"]) for row in answers] == [(step, n) for step in (1, 2) for n in range(2)]
    assert all(row["finish_reason"] == "stop" and row["malformed"] == 0 for row in answers)
    assert any(row["blocks"] and row["critical_tokens"] < row["tokens"] for row in answers)
    given = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[:2]]
    assert all(row["prompt"] in answer["prompt"] for row, answer in zip(given, answers[:2], strict=True))
    lines = [record.getMessage() for record in caplog.records if "free answers" in record.getMessage()]
    assert len(lines) == 2 and "2 ended by themselves, 2 well-formed" in lines[0]


def write_set(folder: Path, rows: list[dict[str, str]], *keys: str) -> None:
    """Rows as the data set of `run_of`."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preprocess_data(
        PreprocessConfig(
            input=str(folder / "rows.jsonl"), output_prefix=str(folder / "set"), append_eod=True, workers=1,
            json_keys=list(keys), tokenizer_model=str(EXAMPLE / "model"),
        )
    )  # fmt: skip


def test_documents_that_ask_nothing_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # As where a set of continued pretraining, whose documents have no prompt, stands before one with prompts.
    write_set(tmp_path, [{"text": "Answer: 1"}] * 3, "text")
    (tmp_path / "with").mkdir()
    long = "Work out A = 1 + 1. " * 400
    write_set(tmp_path / "with", [{"p": text, "r": "A = 2"} for text in (long, "A = 1 + 1?")], "p", "r")
    prefixes = [str(tmp_path / "set"), str(tmp_path / "with" / "set")]
    data = {"data_prefixes": prefixes, "valid_prefixes": prefixes, "overlong": "drop", "num_workers": 0}
    data |= {"tokenizer_model": str(EXAMPLE / "model"), "seq_length": 512}
    config = run_of(tmp_path, "run", eval_prompts=8, eval_tokens=3, eval_iters=1, data=data)
    with caplog.at_level(logging.INFO):
        train(config, observe=FreeRunning(config))
    answers = rows(tmp_path / "run", "answer")
    assert [(row["step"], row["number"], row["prompt"]) for row in answers] == [(n, 0, "A = 1 + 1?") for n in (1, 2)]
    assert "4 documents without a prompt that can be answered are passed over" in caplog.text


def test_a_validation_set_without_prompts_is_refused_before_the_run(tmp_path: Path) -> None:
    write_set(tmp_path, [{"text": "Answer: 1"}] * 3, "text")
    with pytest.raises(ConfigError, match=r"^eval_prompts 2 finds no prompt in .*: of 3 documents 3 have none"):
        FreeRunning(run_of(tmp_path, "run", eval_prompts=2))


def test_where_nothing_could_be_answered_it_is_said(tmp_path: Path) -> None:
    for changes, message in (
        ({"eval_prompts": 1, "engine": "deepspeed"}, "whole weights, which deepspeed.zero_stage 3 cuts up"),
        ({"eval_prompts": -1}, "must not be negative"),
        ({"eval_prompts": 1, "eval_tokens": 0}, "eval_tokens must be at least 1"),
        ({"eval_prompts": 1, "data": {"data_prefixes": ["x"]}}, "data.valid_prefixes, which is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_of(tmp_path, "run", **changes)
