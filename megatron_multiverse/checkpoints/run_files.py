"""The names of the files in a folder of checkpoints, as Megatron, the trainer and the converter write them.

RUN/latest_checkpointed_iteration.txt   which checkpoint is in force: a step, or "release"
RUN/iter_0000100/                       the checkpoint of a step; the trainer's own hold these beside the tensors:
    model_config.json                   the shape of the model
    train_config.json                   the settings of the run
    tokenizer_record.json               type, fingerprint and size of the tokenizer beside it, ids of its tags
RUN/release/                            weights without training state
RUN/model/                              the weights at the end of training, as a model folder, with their tokenizer
RUN/model_config.json                   the shape of the model of converted weights
RUN/conversion.json                     where converted weights came from
RUN/metrics.jsonl                       what a training run reported, a line a time
"""

from __future__ import annotations

import re

POINTER_FILE = "latest_checkpointed_iteration.txt"
MODEL_CONFIG_FILE = "model_config.json"
TRAIN_CONFIG_FILE = "train_config.json"
TOKENIZER_RECORD_FILE = "tokenizer_record.json"
RECORD_FILE = "conversion.json"
METRICS_FILE = "metrics.jsonl"
RELEASE = "release"
MODEL_FOLDER = "model"
ITERATION_GLOB = "iter_*"


def iteration_folder(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"iter_{step:07d}"


def step_of(name: str) -> int | None:
    """The step whose checkpoint has this name, None for any other name."""
    match = re.fullmatch(r"iter_(\d+)", name)
    return int(match[1]) if match else None
