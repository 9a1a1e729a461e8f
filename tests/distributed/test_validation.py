"""A validation finds the same over ranks as in one process: the loss, the correct tags, and what the model answers."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.data.loader import SFTLoader
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.data.sft_dataset import SFTDataset
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.evaluation.free_running import FreeRunning
from megatron_multiverse.parallel.local_ranks import run_ranks
from megatron_multiverse.training.trainer import train

from .runs import LAYOUTS, LIMIT_S, TOKENIZER, config

RUN: dict[str, Any] = {
    "model": None, "init_from": str(TOKENIZER), "train_iters": 1, "optim.lr": 1e-6, "optim.lr_warmup_iters": 0,
    "eval_prompts": 3, "eval_tokens": 80,
}  # fmt: skip
"""One step, hardly a change, of the quickstart's trained model, which forks."""
NAMES = ["sequence", "pipeline", "data", "context"]
ZERO: dict[str, dict[str, Any]] = {
    "ZeRO 2": {
        "engine": "deepspeed", "deepspeed.zero_stage": 2, "layers.loss_chunk_tokens": None, "eval_iters": 1,
    },
}  # fmt: skip


def validate(data: Path, folder: Path, layouts: dict[str, dict[str, Any]]) -> None:
    """One run in each layout, by the same processes."""
    for name, layout in layouts.items():
        run = config(data, folder / name, **RUN, **layout)
        train(run, observe=FreeRunning(run))


def validate_on_two(data: Path, folder: Path, layouts: dict[str, dict[str, Any]]) -> None:
    """What each of two ranks does."""
    os.environ["WORLD_SIZE"] = "2"
    validate(data, folder, layouts)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def found(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The validation and the answers of a run."""
    rows = metrics(run)
    (valid,), answers = ([row for row in rows if row["kind"] == kind] for kind in ("valid", "answer"))
    return valid, [{name: value for name, value in row.items() if name != "time"} for row in answers]


def test_ranks_validate_and_answer_as_one_process_does(data: Path, tmp_path: Path) -> None:
    """Ranks that hold one model answer together; of those with a model each, one has two of the prompts."""
    layouts = {name: LAYOUTS[name][1] for name in NAMES}
    if importlib.util.find_spec("deepspeed") is not None:
        layouts |= ZERO
    validate(data, tmp_path, {"one": {"engine": "one_process"}})
    run_ranks(validate_on_two, 2, data, tmp_path, layouts, timeout=LIMIT_S)
    valid, answers = found(tmp_path / "one")
    assert valid["tags"] > 30 and valid["tag_accuracy"] == valid["correct_tags"] / valid["tags"] > 0.9
    assert len(answers) == 3 and any(answer["blocks"] for answer in answers)
    for name in layouts:
        mine, texts = found(tmp_path / name)
        assert texts == answers, name
        assert mine["loss"] == pytest.approx(valid["loss"], abs=1e-7)  # of a model that knows the answers
        assert [mine[key] for key in ("tags", "loss_tokens")] == [valid[key] for key in ("tags", "loss_tokens")]
        assert abs(mine["correct_tags"] - valid["correct_tags"]) <= 1  # two tokens may be as likely


def train_in(data: Path, folder: Path, layouts: dict[str, dict[str, Any]]) -> None:
    """One step in each layout, by the same processes."""
    for name, layout in layouts.items():
        train(config(data, folder / name, **{"train_iters": 1, "optim.lr_warmup_iters": 0, **layout}))


def train_on_two(data: Path, folder: Path, layouts: dict[str, dict[str, Any]]) -> None:
    """What each of two ranks does."""
    os.environ["WORLD_SIZE"] = "2"
    train_in(data, folder, layouts)


def test_a_small_validation_set_counts_once(data: Path, tmp_path: Path) -> None:
    """Whatever `eval_iters` asks for: one of two data parallel ranks is left with padding, and an interleaved pipeline
    with fewer microbatches than it takes at a time."""
    rows = (data.parent / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:5]))
    prefix, tokenizer = tmp_path / "few", build_tokenizer("HuggingFaceTokenizer", TOKENIZER)
    settings = {"tokenizer_model": str(TOKENIZER), "append_eod": True, "workers": 1}
    preprocess_data(PreprocessConfig(input=str(tmp_path / "rows.jsonl"), output_prefix=str(prefix), **settings))
    few = SFTDataset(str(prefix), tokenizer.structure_vocab)
    once = list(SFTLoader(few, seq_length=512, micro_batch_size=1, pad=0, epochs=1, overlong="drop"))
    assert len(once) % 2 == 1
    tokens = sum(int(batch["loss_mask"].sum()) for batch in once)

    same = {"data.valid_prefixes": [str(prefix)], "eval_iters": 10}
    layouts = {name: {**LAYOUTS[name][1], **same} for name in ("data", "pipeline", "interleaved")}
    if importlib.util.find_spec("deepspeed") is not None:
        layouts["ZeRO 2"] = {**ZERO["ZeRO 2"], **same}
    run_ranks(train_on_two, 2, data, tmp_path, layouts, timeout=LIMIT_S)
    losses = {}
    for name in layouts:
        valid = next(row for row in metrics(tmp_path / name) if row["kind"] == "valid")
        losses[name] = valid["loss"]
        assert valid["loss_tokens"] == tokens, name
    assert losses == pytest.approx(dict.fromkeys(losses, losses["pipeline"]), rel=1e-5)


def test_what_cannot_answer_is_refused_by_name(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"deepspeed\.zero_stage 3 cuts up"):
        config(data, tmp_path, **RUN, engine="deepspeed", **{"layers.loss_chunk_tokens": None})
    with pytest.raises(ConfigError, match=r"interleaved pipeline.*virtual_pipeline_model_parallel_size"):
        config(data, tmp_path, **RUN, **LAYOUTS["interleaved"][1])
