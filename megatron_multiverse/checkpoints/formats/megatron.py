"""A Megatron checkpoint as a source, in either of its formats: torch_dist or mp_rank_XX files.

The folder may be the one given to Megatron's --save (it names its newest checkpoint in
latest_checkpointed_iteration.txt) or one checkpoint in it. The model's shape comes, in this order, from --model-config,
from a model_config.json in the checkpoint itself (written by this trainer), from conversion.json (written by this
converter), from a model_config.json beside the checkpoint, and from the `args` that Megatron-LM puts into it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.completeness import StoredTensor, check_complete
from megatron_multiverse.checkpoints.formats.hf_config import hf_config_to_model_config
from megatron_multiverse.checkpoints.formats.json_files import read_json_object, read_model_config
from megatron_multiverse.checkpoints.formats.legacy import LegacyReader, is_legacy
from megatron_multiverse.checkpoints.formats.megatron_args import config_from_args
from megatron_multiverse.checkpoints.formats.torch_dist import TorchDistReader
from megatron_multiverse.checkpoints.names.registry import find_family
from megatron_multiverse.checkpoints.names.table import Entry, Family, entries
from megatron_multiverse.checkpoints.run_files import (
    MODEL_CONFIG_FILE,
    MODEL_FOLDER,
    POINTER_FILE,
    RECORD_FILE,
    RELEASE,
    iteration_folder,
)
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.config.strict import dataclass_from_mapping
from megatron_multiverse.errors import CheckpointError, ConfigError

OUTPUT = "output_layer.weight"
HYBRID_ARGS = ("hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model")


def is_megatron(folder: str | Path) -> bool:
    """Whether the folder is a Megatron checkpoint, or the folder of a run that has one."""
    path = Path(folder)
    return (path / POINTER_FILE).is_file() or _is_one_checkpoint(path)


def _is_one_checkpoint(path: Path) -> bool:
    return (path / ".metadata").is_file() or (path / "metadata.json").is_file() or is_legacy(path)


def checkpoint_folder(folder: str | Path) -> Path:
    """The newest checkpoint of a run's folder, or the folder itself if it is a checkpoint.

    Args:
        folder: one of the two, see `is_megatron`.

    Raises:
        CheckpointError: the pointer file names a checkpoint that is not there.
    """
    path = Path(folder)
    if _is_one_checkpoint(path):
        return path
    pointer = path / POINTER_FILE
    text = pointer.read_text(encoding="utf-8", errors="replace").strip()
    inner = path / (iteration_folder(int(text)) if text.isdigit() else text)
    if not inner.is_dir():
        raise CheckpointError(f"{pointer} names {text!r}, but {inner} does not exist: name a checkpoint that does")
    return inner


class McoreSource:
    """A megatron-core checkpoint.

    Args:
        folder: see above; `is_megatron` must hold.
        family: name of the family; default the recorded one, or the one with the model's biases and norms.
        config: a model_config.json or Hugging Face config.json with the model's shape; default see above.
        vocab_size: real rows of the vocabulary; further rows are padding and dropped. Default: as recorded, else all.
        trust_pickle: load pickles without restrictions.

    Raises:
        CheckpointError: files or tensors are missing, too many or damaged.
        ConfigError: the model is not supported, or its shape is unknown.
    """

    def __init__(
        self,
        folder: str | Path,
        family: str | None = None,
        config: str | Path | None = None,
        vocab_size: int | None = None,
        trust_pickle: bool = False,
    ) -> None:
        self.folder = Path(folder)
        inner = checkpoint_folder(folder)
        self.reader: TorchDistReader | LegacyReader
        if is_legacy(inner):
            self.reader = LegacyReader(inner, trust_pickle)
            args = self.reader.args
        else:
            self.reader = TorchDistReader(inner, trust_pickle)
            args = self.reader.common.get("args")
        _refuse_hybrid(self.reader.keys(), args, inner)
        self.files = self.reader.files
        self.described_by = [*self.reader.described_by, *_descriptions(inner), *_given_files(config)]
        record = _first_json(RECORD_FILE, inner, inner.parent)
        self.hf_config: dict[str, Any] | None = record.get("hf_config")
        self.asset_folders = list(dict.fromkeys([self.folder, inner, inner.parent, inner.parent / MODEL_FOLDER]))
        # Only what this converter wrote is known to come from elsewhere than training.
        self.trained = not (record and inner.name == RELEASE)
        stored = _model_config(inner, Path(config) if config else None, record, args)
        self.family: Family = find_family(family or record.get("family"), stored)
        rows = _real_rows(vocab_size, record, stored)
        self.config: ModelConfig = dataclasses.replace(stored, vocab_size=rows)
        self._entries = entries(self.family, self.config)
        self._check()

    def _check(self) -> None:
        """Every tensor of the name table is there, and nothing else; the vocabulary may have rows of padding."""
        needed = []
        for entry in self._entries:
            shape, wanted = self.reader.shape(entry), entry.shape
            if entry.rule == "vocab":
                wanted = (max(shape[0], wanted[0]), *wanted[1:])
            needed.append(StoredTensor(self.reader.key(entry), self.reader.where(entry), shape, wanted))
        present = self.reader.keys()
        # The last pipeline stage keeps a copy of a tied embedding; `read` refuses it if it is none.
        self._has_copy = self.config.share_embeddings_and_output_weights and OUTPUT in present
        if self._has_copy:
            present.discard(OUTPUT)
        check_complete(needed, present, self.reader.file_of, self.family)

    def entries(self) -> list[Entry]:
        """All tensors, in the order of the network."""
        return self._entries

    def where(self, entry: Entry) -> Path:
        """A file that holds a part of the tensor."""
        return self.reader.where(entry)

    def dtype(self, entry: Entry) -> torch.dtype:
        """Dtype on disk."""
        return self.reader.dtype(entry)

    def read(self, entry: Entry) -> Tensor:
        """One whole tensor, vocabulary padding cut off. A tied embedding is compared with the last stage's copy.

        Raises:
            CheckpointError: it cannot be read, or the copy differs.
        """
        tensor = self.reader.read(entry)[: entry.shape[0]]
        if entry.rule == "vocab" and self._has_copy:
            copy = dataclasses.replace(entry, mcore=OUTPUT)
            if not torch.equal(tensor, self.reader.read(copy)[: entry.shape[0]]):
                raise CheckpointError(
                    f"{self.reader.where(copy)}: {OUTPUT} differs from the embedding, but the model's config says that "
                    "they are tied (share_embeddings_and_output_weights): give --model-config if they are not"
                )
        return tensor


def _refuse_hybrid(keys: set[str], args: Any, inner: Path) -> None:
    """Newer Megatron-LM trains GPT-like models as HybridModel too, whose layers are attention or MLP by a pattern."""
    values = vars(args) if args is not None and not isinstance(args, dict) else args or {}
    pattern = next((values[name] for name in HYBRID_ARGS if values.get(name)), None)
    if pattern is not None or "decoder.final_norm.weight" in keys:
        raise ConfigError(
            f"{inner} is a checkpoint of Megatron's HybridModel (layer pattern {pattern or 'not recorded'}), which is "
            "not supported: Megatron-LM's tools/checkpoint/gpt_hybrid_conversion.py makes a GPTModel of it if its "
            "layers are attention and MLP alone"
        )


def _descriptions(inner: Path) -> list[Path]:
    """The small files beside the weights that say what model they are."""
    folders = (inner, inner.parent)
    files = [folder / name for name in (POINTER_FILE, RECORD_FILE, MODEL_CONFIG_FILE) for folder in folders]
    return [file for file in files if file.is_file()]


def _given_files(config: str | Path | None) -> list[Path]:
    """The file that --model-config names."""
    if config is None:
        return []
    path = Path(config)
    return [path if path.is_file() else path / "config.json"]


def _real_rows(given: int | None, record: dict[str, Any], stored: ModelConfig) -> int:
    """Rows of the vocabulary that are no padding."""
    # A record beside the checkpoints of a run speaks of the weights that the run began with, perhaps of fewer rows.
    recorded: int | None = record.get("vocab_size") if record.get("padded_vocab_size") == stored.vocab_size else None
    if given is not None and recorded is not None and given != recorded:
        raise ConfigError(f"--vocab-size is {given}, but {RECORD_FILE} says {recorded}: leave --vocab-size out")
    rows = given or recorded or stored.vocab_size
    if not 1 <= rows <= stored.vocab_size:
        raise ConfigError(f"--vocab-size must be from 1 to the {stored.vocab_size} rows of the checkpoint, got {rows}")
    return rows


def _first_json(name: str, *folders: Path) -> dict[str, Any]:
    """The first such file in the folders; empty if there is none."""
    return next((read_json_object(folder / name) for folder in folders if (folder / name).is_file()), {})


def _model_config(inner: Path, given: Path | None, record: dict[str, Any], args: Any) -> ModelConfig:
    """The shape as stored, padding rows included where the file knows of them."""
    if given is not None:
        (file,) = _given_files(given)
        if not file.is_file():
            raise ConfigError(f"--model-config {given} is neither a file nor a folder with a config.json")
        values = read_json_object(file)
        return hf_config_to_model_config(values) if "model_type" in values else read_model_config(file)
    own, beside = inner / MODEL_CONFIG_FILE, inner.parent / MODEL_CONFIG_FILE
    if own.is_file():
        return read_model_config(own)
    if "model_config" in record:
        return dataclass_from_mapping(ModelConfig, record["model_config"], where=RECORD_FILE)
    if beside.is_file():
        return read_model_config(beside)
    if args is not None:
        return config_from_args(args, where=str(inner))
    raise ConfigError(
        f"{inner} does not say what model it holds (no {RECORD_FILE}, no {MODEL_CONFIG_FILE}, no args): give "
        "--model-config with a model_config.json or the config.json of the Hugging Face model"
    )
