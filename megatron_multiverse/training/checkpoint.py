"""The state of a run on disk in megatron-core's `torch_dist` format, and what is said when that cannot be done."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_multiverse.checkpoints.formats.pickles import load_torch_file
from megatron_multiverse.checkpoints.formats.torch_dist import TorchDistReader
from megatron_multiverse.errors import CheckpointError, MultiverseError
from megatron_multiverse.model.cpu import device_neutral_cuda
from megatron_multiverse.training.engine import TrainEngine
from megatron_multiverse.training.host_memory import HostMemory
from megatron_multiverse.training.microbatches import Position
from megatron_multiverse.training.seeds import rng_state, set_rng_state
from megatron_multiverse.training.state_writing import StateWriting, begin_writing, quiet


@dataclass
class TrainState:
    """Everything that changes while training, i.e. everything a checkpoint holds."""

    engine: TrainEngine
    loader: Position
    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Packed rows trained on so far, over all ranks."""
    host: HostMemory = field(default_factory=HostMemory)
    """Where checkpoints of it are copied to; one at a time."""


def begin_saving(state: TrainState, folder: Path) -> StateWriting:
    """Begin to write the state, as it is now, into a folder; training may go on before it is written.

    What was begun before must have come to its end.

    Raises:
        CheckpointException: megatron-core or torch could not do it. Not a subclass of Exception: see `explained`.
    """
    run = {
        "checkpoint_version": 3.0,
        "iteration": state.step,
        "consumed_samples": state.consumed_samples,
        "rng_state": rng_state(),
        "data_loader": state.loader.state_dict(),
    }
    started = time.perf_counter()
    state.host.reuse()
    with device_neutral_cuda():
        parts = state.engine.state(host=state.host)
        state.host.wait()  # megatron-core may read what lies on the host
        gathered_s = time.perf_counter() - started
        writing = begin_writing({**parts, **run}, folder, state.host)
    writing.seconds["gather_s"] = gathered_s
    return writing


def load_state(state: TrainState, folder: Path) -> None:
    """Read a checkpoint into the state, in place, random generators included.

    Raises:
        CheckpointError: it is damaged or does not fit the state; the message names the damaged file if there is one.
    """
    remedy = "copy it again, or write the number of another iter_ folder into latest_checkpointed_iteration.txt"
    with explained(f"{folder} cannot be resumed", remedy):
        try:
            with device_neutral_cuda(), quiet():
                loaded = dist_checkpointing.load(state.engine.state(is_loading=True), str(folder))
        except (Exception, CheckpointException):
            try:
                raise_if_damaged(folder)
            except CheckpointError as damage:
                raise CheckpointError(f"{damage}; {remedy}") from damage
            raise
        state.engine.load(loaded, folder)
        state.loader.load_state_dict(loaded["data_loader"])
        set_rng_state(loaded["rng_state"])
        state.step = loaded["iteration"]
        state.consumed_samples = loaded["consumed_samples"]


def raise_if_damaged(folder: Path) -> None:
    """Look for the file that makes a `torch_dist` checkpoint unreadable.

    Raises:
        CheckpointError: a file is missing, cut off or not what it should be; the message names it.
    """
    reader = TorchDistReader(folder)
    for place, info in reader.metadata.storage_data.items():
        if not isinstance(reader.metadata.state_dict_metadata[place.fqn], TensorStorageMetadata):
            continue  # an object, whose pickle may hold classes that are not loaded without trust
        file = folder / info.relative_path
        with open(file, "rb") as stream:
            stream.seek(info.offset)
            part = io.BytesIO(stream.read(info.length))
        try:
            load_torch_file(file, part=part)
        except CheckpointError as error:
            raise CheckpointError(f"{error} (it holds {place.fqn})") from error


@contextlib.contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever stops the block into one CheckpointError: "what (cause): remedy".

    torch's CheckpointException, which megatron-core passes on, is a BaseException: `except Exception` misses it. Errors
    of this package explain themselves and pass.

    Raises:
        CheckpointError: the block failed.
    """
    try:
        yield
    except MultiverseError:
        raise
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{what} ({_cause(error)}): {remedy}") from error


def _cause(error: BaseException) -> str:
    """The first line of what went wrong; of torch's collection of errors, that of the first rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
