"""What tensors cannot tell of a run: the shape of its model, its settings and its tokenizer.

Every checkpoint holds it, so that each is whole by itself: it can be copied, converted and resumed without the files
beside it, and a resumed run is held against it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_multiverse.checkpoints.own_tokenizer import tokenizer_record
from megatron_multiverse.checkpoints.run_files import MODEL_CONFIG_FILE, TOKENIZER_RECORD_FILE, TRAIN_CONFIG_FILE
from megatron_multiverse.config import ModelConfig, RLConfig, TrainConfig
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import CheckpointError, ConfigError
from megatron_multiverse.files import write_json_atomic

logger = logging.getLogger(__name__)

WITHOUT_EFFECT = (
    # Where things lie, how often something is said or saved, and how the work is shared out on this machine.
    *("checkpoint", "log", "device", "data.num_workers", "data.valid_prefixes", "deepspeed"),
    *("eval_interval", "eval_iters", "eval_prompts", "eval_tokens", "rollout.keep_records", "rollout.free_cache"),
    # The model's shape is compared by itself; the state of the data knows its documents, seed and row length.
    *("model", "model_preset", "init_from", "add_control_tokens"),
    *("data.data_prefixes", "data.plain_prefixes", "data.tokenizer_type", "data.tokenizer_model", "data.seq_length"),
    *("seed", "task"),  # of prompts, too, what they are is part of their state, wherever they lie
    # The schedule of the learning rate is compared as a whole, by what it was made of (optim.py).
    *("train_iters", "optim.lr", "optim.min_lr", "optim.lr_warmup_iters", "optim.lr_decay_style"),
    "optim.lr_decay_iters",
)
"""Settings, or groups of them, in which a resumed run may differ without a warning from here."""
_ABSENT = "nothing"
"""The value of a setting that is not there, in a warning."""


@dataclass(frozen=True)
class RunDescription:
    """What a checkpoint says of the run that saved it."""

    model: ModelConfig
    """Shape of the model."""
    config: TrainConfig | RLConfig
    """The run, without any "auto" in its layers."""
    tokenizer: MultiverseTokenizer | None = None
    """The one that wrote the data, with the tags; None if the run was handed its data otherwise."""

    def write(self, folder: Path) -> None:
        """Write it into a new checkpoint, `train_config.json` first: that file proves the folder to be ours."""
        (folder / TRAIN_CONFIG_FILE).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        self.model.to_json(folder / MODEL_CONFIG_FILE)
        self.write_tokenizer(folder)

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer with its tags, then the record of its ids, which vouches for it."""
        if self.tokenizer is None:
            return
        self.tokenizer.save(folder)
        write_json_atomic(folder / TOKENIZER_RECORD_FILE, tokenizer_record(self.tokenizer))

    def check(self, folder: Path) -> None:
        """Hold the run that is about to go on against the checkpoint in `folder`.

        Other settings that change its numbers are warned of.

        Raises:
            CheckpointError: the checkpoint does not say what it holds.
            ConfigError: it holds another model; the message names every field that differs.
        """
        differing = _differences(_read(folder / MODEL_CONFIG_FILE), dataclasses.asdict(self.model))
        if differing:
            what = ", ".join(f"{name} {was!r} there, {now!r} here" for name, was, now in differing)
            raise ConfigError(
                f"{folder} was saved by a run of another model ({what}): name the model of the checkpoint, or choose "
                "another folder in checkpoint.save"
            )
        for name, was, now in _differences(_read(folder / TRAIN_CONFIG_FILE), self.config.to_dict()):
            is_newer = was == _ABSENT and _is_default(self.config, name)  # than the version that wrote the checkpoint
            if not is_newer and not any(f"{name}.".startswith(f"{known}.") for known in WITHOUT_EFFECT):
                logger.warning(
                    "the steps so far ran with %s %s, this run goes on with %s: its numbers are not those of a run "
                    "that was never interrupted",
                    name, was, now,
                )  # fmt: skip


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}), so {file.parent} is no whole checkpoint of this trainer: copy it again, "
            "or write the number of another iter_ folder into latest_checkpointed_iteration.txt"
        ) from error
    return values if isinstance(values, dict) else {}


def _differences(was: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted name, saved value, present value) of all that differs, as JSON would write it."""
    flat_was, flat_now = _flat(was), _flat(json.loads(json.dumps(now)))
    names = {**flat_now, **flat_was}
    pairs = ((name, flat_was.get(name, _ABSENT), flat_now.get(name, _ABSENT)) for name in names)
    return [(name, before, after) for name, before, after in pairs if before != after]


def _is_default(config: Any, name: str) -> bool:
    """Whether a setting, by its dotted name, has the value that it has where nobody names it."""
    *parents, last = name.split(".")
    for parent in parents:
        config = getattr(config, parent, None)
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    return any(field.name == last and getattr(config, last) == field.default for field in fields)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
