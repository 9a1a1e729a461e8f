"""Opens a checkpoint of any format as a source of tensors: the one place that tells the formats apart."""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path

from megatron_multiverse.checkpoints.formats.hf import HFSource
from megatron_multiverse.checkpoints.formats.json_files import read_json_object
from megatron_multiverse.checkpoints.formats.megatron import McoreSource, checkpoint_folder, is_megatron
from megatron_multiverse.checkpoints.formats.model_folder import ModelFolderSource, is_model_folder
from megatron_multiverse.checkpoints.protocols import Side, Source
from megatron_multiverse.checkpoints.run_files import (
    ITERATION_GLOB,
    MODEL_FOLDER,
    POINTER_FILE,
    iteration_folder,
    step_of,
    why_outdated,
)
from megatron_multiverse.checksums import check_files, is_checked, quick_checksum
from megatron_multiverse.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

_FETCH = "A model of the Hugging Face hub is fetched into one first: hf download OWNER/NAME --local-dir FOLDER"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def open_checkpoint(
    folder: str | Path,
    *,
    side: Side | None = None,
    family: str | None = None,
    model_config: str | Path | None = None,
    vocab_size: int | None = None,
    trust_pickle: bool = False,
) -> Source:
    """A checkpoint of any format as a source of tensors; every header is read and checked, no tensor is.

    The format is found out from the files: Megatron's torch_dist or mp_rank_XX files (or the folder of a run that
    holds them), a model folder of this package (or the folder of a run that has one), or a Hugging Face folder.

    Args:
        folder: the checkpoint.
        side: what the caller expects it to be; default anything.
        family: name of the model's family; default what the checkpoint says.
        model_config: for Megatron's formats alone, a file with the model's shape, where the checkpoint does not say it.
        vocab_size: for Megatron's formats alone, real rows of the vocabulary, where the checkpoint does not say it.
        trust_pickle: load pickles without restrictions.

    Raises:
        CheckpointError: it is none of them, not of the expected side, or incomplete.
        ConfigError: the model it holds is not supported, or an option has no effect on it.
    """
    path = _in_run_folder(Path(folder))
    _refuse_no_checkpoint(path)
    megatron = is_megatron(path)  # asked first: a run folder of the trainer has a config.json too
    ours = not megatron and is_model_folder(path)
    found: Side = "mcore" if ours or megatron else "hf"
    if side not in (None, found):
        kind = {"hf": "a Hugging Face model", "mcore": "a megatron-core checkpoint or a model folder"}[found]
        raise CheckpointError(f"{path} holds {kind}, which is --from {found}; --from says {side}")
    if megatron:
        return McoreSource(path, family, model_config, vocab_size, trust_pickle)
    for name, value in (("--model-config", model_config), ("--vocab-size", vocab_size)):
        if value is not None:
            raise ConfigError(
                f"{name} {value} is for Megatron's formats; {path} says in its config.json what model it holds: leave "
                f"{name} out, or correct that file"
            )
    if ours and (outdated := why_outdated(path)) is not None:
        _warn_once(outdated)
    return ModelFolderSource(path, family) if ours else HFSource(path, family)


@functools.cache
def _warn_once(message: str) -> None:
    """Loading a model opens its checkpoint several times."""
    logger.warning("%s", message)


def loadable(load: Path) -> Path:
    """The folder that a tool's --load stands for, where model and tokenizer lie; no file of the model is opened.

    Of a training run this is the checkpoint in force, where the tokenizer lies; other folders are returned as they are.

    Raises:
        CheckpointError: it is no folder, or holds no checkpoint.
    """
    if not load.exists():
        raise CheckpointError(f"--load {load}: no such folder; name a folder with a model. {_FETCH}")
    try:
        path = _in_run_folder(load)
        _refuse_no_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"--load: {error}") from error
    inner = checkpoint_folder(path) if is_megatron(path) else path
    if any((inner / name).is_file() and not (path / name).is_file() for name in _TOKENIZER_FILES):
        logger.info("--load %s is the folder of a run: taking %s", load, inner)
        return inner
    return path


def check_source(source: Source) -> None:
    """Hold the files of a checkpoint against the checksums that lie beside them, if there are any.

    Raises:
        CheckpointError: a file is not what was written.
    """
    for folder in sorted({folder for file in source.files for folder in (file.parent, file.parent.parent)}):
        check_files(folder)


def weights_fingerprint(folder: str | Path) -> str:
    """A hash of a checkpoint's shape and weights: training that went on leaves another model under the same name. Of
    files above 64 MiB it sees what stands at 64 places.

    Raises:
        CheckpointError, ConfigError: see `open_checkpoint`.
    """
    source = open_checkpoint(folder)
    parts = [repr(source.config), *sorted(quick_checksum(file) for file in source.files if is_checked(file))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _refuse_no_checkpoint(path: Path) -> None:
    if is_megatron(path):
        return
    if not (path / "config.json").is_file():
        inner = sorted(file.parent for file in path.glob("*/config.json") if _describes_a_model(file))
        hint = f"; {inner[0]} is one" if inner else "; give the folder that has one of them"
        raise CheckpointError(
            f"{path} is no checkpoint: it has neither config.json (Hugging Face, model folder) nor {POINTER_FILE}, "
            f".metadata or mp_rank folders (Megatron){hint}"
        )
    if not _describes_a_model(path / "config.json"):
        raise CheckpointError(
            f"{path / 'config.json'} describes no model (it has neither model_type nor num_layers); if this is the "
            "folder of a run, give a checkpoint in it"
        )


def _in_run_folder(path: Path) -> Path:
    """The final weights of a run whose folder has no checkpoint; any other folder is returned as it is.

    Raises:
        CheckpointError: it is no folder, or the folder of a run where nobody can tell which checkpoint is meant.
    """
    if not path.is_dir():
        hint = "" if path.exists() else f". {_FETCH}"
        if path.is_file() and (path.parent / "config.json").is_file():
            hint = f": {path.parent} is one"
        raise CheckpointError(f"{path} is no folder; give the folder of a checkpoint{hint}")
    if is_megatron(path):
        return path
    steps = sorted(step for step in (step_of(file.name) for file in path.glob(ITERATION_GLOB)) if step is not None)
    if steps:
        raise CheckpointError(
            f"{path} has checkpoints, but no {POINTER_FILE} that says which is in force: give one of them, the newest "
            f"is {path / iteration_folder(steps[-1])}"
        )
    if is_model_folder(path / MODEL_FOLDER) and not _describes_a_model(path / "config.json"):
        logger.info("%s is the folder of a run: taking %s", path, path / MODEL_FOLDER)
        return path / MODEL_FOLDER
    return path


def _describes_a_model(file: Path) -> bool:
    return file.is_file() and not {"model_type", "num_layers"}.isdisjoint(read_json_object(file))
