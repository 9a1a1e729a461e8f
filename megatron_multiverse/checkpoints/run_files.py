"""The names of the files in a folder of checkpoints, as Megatron, the trainer and the converter write them.

RUN/latest_checkpointed_iteration.txt   which checkpoint is in force: a step, or "release"
RUN/iter_0000100/                       the checkpoint of a step; the trainer's own hold these beside the tensors:
    model_config.json                   the shape of the model
    train_config.json                   the settings of the run
    tokenizer_record.json               type, fingerprint and size of the tokenizer beside it, ids of its tags
RUN/release/                            weights without training state
RUN/model/                              the weights at the end of training, as a model folder, with their tokenizer
    training_step.txt                   the step they are of
RUN/model_config.json                   the shape of the model of converted weights
RUN/conversion.json                     where converted weights came from
RUN/metrics.jsonl                       what a training run reported, a line a time
"""

from __future__ import annotations

import os
import re
from pathlib import Path

POINTER_FILE = "latest_checkpointed_iteration.txt"
MODEL_CONFIG_FILE = "model_config.json"
TRAIN_CONFIG_FILE = "train_config.json"
TOKENIZER_RECORD_FILE = "tokenizer_record.json"
RECORD_FILE = "conversion.json"
METRICS_FILE = "metrics.jsonl"
RELEASE = "release"
MODEL_FOLDER = "model"
STEP_FILE = "training_step.txt"
ITERATION_GLOB = "iter_*"


def iteration_folder(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"iter_{step:07d}"


def step_of(name: str) -> int | None:
    """The step whose checkpoint has this name, None for any other name."""
    match = re.fullmatch(r"iter_(\d+)", name)
    return int(match[1]) if match else None


def trained_steps(folder: Path) -> int | None:
    """The step that a checkpoint of a training run, or the model at its end, is of; None where that is not told."""
    folder = Path(os.path.abspath(folder))  # "." has no name; links keep theirs
    if (step := step_of(folder.name)) is not None:
        return step
    return _number_in(folder / STEP_FILE)


def why_outdated(model: Path) -> str | None:
    """That a run went on after it had left these weights at its end, with the step where it stands now; else None.

    Args:
        model: RUN/model.
    """
    model = Path(os.path.abspath(model))
    step, now = trained_steps(model), _number_in(model.parent / POINTER_FILE)
    if model.name != MODEL_FOLDER or step is None or now is None or now == step:
        return None
    return (
        f"{model} holds the weights of step {step}, where this run had ended before; the run stands at step {now}: "
        f"give {model.parent} for these"
    )


def _number_in(file: Path) -> int | None:
    text = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    return int(text) if text.isascii() and text.isdecimal() else None
