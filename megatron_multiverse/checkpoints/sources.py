"""Opens a checkpoint of any format as a source of tensors: the one place that tells the formats apart."""

from __future__ import annotations

from pathlib import Path

from megatron_multiverse.checkpoints.formats.hf import HFSource
from megatron_multiverse.checkpoints.formats.megatron import McoreSource, is_megatron
from megatron_multiverse.checkpoints.formats.model_folder import ModelFolderSource, is_model_folder
from megatron_multiverse.checkpoints.protocols import Side, Source
from megatron_multiverse.checkpoints.run_files import POINTER_FILE
from megatron_multiverse.errors import CheckpointError


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
    holds them), a model folder of this package, or a Hugging Face folder.

    Args:
        folder: the checkpoint.
        side: what the caller expects it to be; default anything.
        family: name of the model's family; default what the checkpoint says.
        model_config: for Megatron's formats, a file with the model's shape, where the checkpoint does not say it.
        vocab_size: for Megatron's formats, real rows of the vocabulary, where the checkpoint does not say it.
        trust_pickle: load pickles without restrictions.

    Raises:
        CheckpointError: it is none of them, not of the expected side, or incomplete.
        ConfigError: the model it holds is not supported.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; give the folder of a checkpoint")
    megatron = is_megatron(path)  # asked first: a run folder of the trainer has a config.json too
    ours = not megatron and is_model_folder(path)
    if not megatron and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is no checkpoint: it has neither config.json (Hugging Face, model folder) nor {POINTER_FILE}, "
            ".metadata or mp_rank folders (Megatron); give the folder that has one of them"
        )
    found: Side = "mcore" if ours or megatron else "hf"
    if side not in (None, found):
        kind = {"hf": "a Hugging Face model", "mcore": "a megatron-core checkpoint or a model folder"}[found]
        raise CheckpointError(f"{path} holds {kind}, which is --from {found}; --from says {side}")
    if megatron:
        return McoreSource(path, family, model_config, vocab_size, trust_pickle)
    if ours:
        return ModelFolderSource(path, family)
    return HFSource(path, family)
