"""The check that every format makes when it is opened: all tensors of the name table are there, and no other is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_multiverse.checkpoints.names.table import Family, Shape
from megatron_multiverse.errors import CheckpointError


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the files hold it, and as the name table wants it."""

    name: str
    """Name in the files."""
    file: Path
    """The file it lies in, or one of them."""
    shape: Shape
    """Shape in the files."""
    wanted: Shape
    """Shape that follows from the model's config."""


def check_complete(
    needed: Iterable[StoredTensor], present: Iterable[str], file_of: Callable[[str], Path], family: Family
) -> None:
    """Check shapes, and that nothing is left over. A tensor that is missing has no StoredTensor: readers refuse it.

    Args:
        needed: the tensors of the name table.
        present: names of all tensors of the model in the files.
        file_of: the file of a tensor by name.
        family: whose table it is, for messages.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    known = set()
    for tensor in needed:
        known.add(tensor.name)
        if tensor.shape != tensor.wanted:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, the model's config asks for "
                f"{list(tensor.wanted)}: the weights and the config do not belong together"
            )
    extra = sorted(set(present) - known)
    if extra:
        raise CheckpointError(
            f"{file_of(extra[0])}: tensor {extra[0]} is not part of a dense {family.name} model with this config "
            f"({len(extra)} such tensors): remove it or correct the config; experts, adapters and further heads "
            "cannot be converted"
        )
