"""Preprocessed rows of the quickstart, and the run in one process that all others are held against."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.checkpoints.fresh import FreshSource
from megatron_multiverse.checkpoints.load import model_from_source
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.model.weights import save_model
from megatron_multiverse.training.trainer import train

from .runs import LAYOUTS, STEPS, TOKENIZER, config, numbers, train_on

EXAMPLE = Path(__file__).parents[2] / "examples/quickstart"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of real-structure data: enough rows that no run here begins an epoch anew."""
    folder = tmp_path_factory.mktemp("data")
    rows, options = folder / "rows.jsonl", ("--num-rows", "200", "--max-expressions", "2")
    subprocess.run([sys.executable, str(EXAMPLE / "generate_data.py"), "--output", str(rows), *options], check=True)
    preprocess_data(
        PreprocessConfig(
            input=str(rows),
            output_prefix=str(folder / "set"),
            tokenizer_model=str(TOKENIZER),
            append_eod=True,
            workers=1,
        )
    )
    return folder / "set"


def run_in_one_process(data: Path, folder: Path, **changes: Any) -> dict[str, list[float]]:
    """Metrics of a run in one process; see `reference`."""
    run = config(data, folder / "run", **{"layers.loss_chunk_tokens": 0, **changes})
    assert run.model is not None
    model, shape = model_from_source(FreshSource(run.model, run.seed))
    save_model(model, shape, folder / "start")
    train(dataclasses.replace(run, model=None, init_from=str(folder / "start"), engine="one_process"))
    return numbers(folder / "run")


@pytest.fixture(scope="session")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Metrics of the run in one process, which starts from the weights that the others draw by themselves and computes
    the loss of a row at once."""
    return run_in_one_process(data, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def half_way(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Layout to the folder of a run in it that is half done."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name: str) -> Path:
        ranks, settings = LAYOUTS[name]
        train_on(ranks, data, folder / name, train_iters=STEPS // 2, **settings)
        return folder / name

    return run
