"""The pickles that are part of Megatron's formats, read without running code from them.

`.metadata` of a torch_dist checkpoint is a pickle, and `common.pt` and `mp_rank_XX` files contain one. The first is
read by an unpickler that knows only torch's and megatron-core's metadata classes; the others by torch's weights-only
unpickler, which allows argparse.Namespace too. With `trust_pickle` plain pickle is used, which runs any code in a file.
"""

from __future__ import annotations

import io
import logging
import pickle
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_multiverse.errors import CheckpointError, first_line

logger = logging.getLogger(__name__)

ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "pathlib": {"PosixPath"},
    "collections": {"OrderedDict"},
}
HINT = "if you trust whoever wrote it, pass --trust-pickle, which runs the code that the file contains"


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, stream: io.BufferedIOBase, file: Path) -> None:
        super().__init__(stream)
        self.file = file

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise CheckpointError(f"{self.file}: asks for {module}.{name}, which no checkpoint metadata needs; {HINT}")
        if module.startswith("megatron."):
            from megatron_multiverse.model import mcore  # noqa: F401  imports megatron-core without its warnings
        return super().find_class(module, name)


def load_metadata(file: Path, trust_pickle: bool = False) -> Metadata:
    """The `.metadata` of a torch_dist checkpoint.

    Raises:
        CheckpointError: damaged, or it asks for classes that metadata does not need.
    """
    with open(file, "rb") as stream:
        try:
            metadata = _trusted(file, stream) if trust_pickle else _MetadataUnpickler(stream, file).load()
        except CheckpointError:
            raise
        except Exception as error:  # damage can raise anything in an unpickler
            raise CheckpointError(f"{file} is damaged ({error}): copy the checkpoint again") from error
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise CheckpointError(f"{file} holds no torch.distributed checkpoint metadata")
    return metadata


def _trusted(file: Path, stream: io.BufferedIOBase) -> Any:
    logger.warning("%s: loading a pickle without restrictions, because --trust-pickle is set", file)
    return pickle.load(stream)


def load_torch_file(file: Path, trust_pickle: bool = False, *, part: Any = None) -> Any:
    """`torch.load` without code execution; tensors are not read: they come on the meta device, with their place.

    Args:
        file: the file.
        trust_pickle: use plain pickle.
        part: a stream over a part of the file, to load from instead.

    Raises:
        CheckpointError: damaged, or it needs --trust-pickle.
    """
    if trust_pickle:
        logger.warning("%s: loading a pickle without restrictions, because --trust-pickle is set", file)
    try:
        known = torch.serialization.get_safe_globals()
        # Only what is not registered yet: at its end the block removes its names, and megatron-core needs Namespace.
        with torch.serialization.safe_globals([kind for kind in (Namespace, SimpleNamespace) if kind not in known]):
            return torch.load(part or file, weights_only=not trust_pickle, map_location="meta")
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), None)
        if reason is None:
            raise CheckpointError(f"{file} is damaged or truncated (its pickle is): copy it again") from error
        raise CheckpointError(f"{file} cannot be read without running code from it ({reason}); {HINT}") from error
    except Exception as error:  # damage can raise anything in an unpickler or in torch's readers
        raise CheckpointError(f"{file} is damaged or truncated ({first_line(error)}): copy it again") from error


def storage_offset(tensor: torch.Tensor) -> int:
    """Byte at which the data of a tensor that `load_torch_file` returned begins in its file or part."""
    base = tensor.untyped_storage()._checkpoint_offset  # set by torch.load onto the meta device
    return int(base or 0) + int(tensor.storage_offset()) * tensor.itemsize
