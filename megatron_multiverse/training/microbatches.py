"""What training asks of its data: microbatches, and the loader that hands them out."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any, Protocol

from torch import Tensor

from megatron_multiverse.data.loader import lost_process
from megatron_multiverse.errors import MultiverseError
from megatron_multiverse.training.signals import hold_signals

Microbatch = dict[str, Tensor]
"""On the host, for b rows of s tokens: ``input_ids``, ``labels``, ``position_ids``, ``r`` int [b, s], and
``loss_mask`` float [b, s], 1 where the label is trained.

If the loader has tag ids, also what tells the D documents of a row apart: ``documents`` int [b, D, 2], ``sample_ids``
int [b, D], ``malformed`` bool [b, D]; see `data.sft_dataset.pack_arrays`."""


class Documents(Protocol):
    """What is known of the documents in microbatches."""

    @property
    def tag_ids(self) -> tuple[int, ...] | None:
        """The ids in which structure is written, in the order of `structure.TAGS`.

        None: structure is not written in the tokens. Then ``position_ids`` and ``r`` of the microbatches count on
        every device, nothing is scanned, and no document is ever named.
        """
        ...

    def sample_name(self, sample_id: int) -> str:
        """How messages call the document with this number in ``sample_ids``."""
        ...

    def sample_problem(self, sample_id: int) -> str | None:
        """Why the loader could not read the structure of a document, None if it could."""
        ...


class Position(Protocol):
    """A place in the data, as part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain values for the checkpoint; the same on all ranks."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from that position. Raises CheckpointError if it belongs to other data or settings."""
        ...


class Loader(Documents, Position, Protocol):
    """A stream of the microbatches of one data parallel rank, which knows where it stands."""

    def __iter__(self) -> Iterator[Microbatch]:
        """Continue from the current position. The stream of training data must not end."""
        ...


def stream(loader: Loader) -> Generator[Microbatch, None, None]:
    """The microbatches of a loader. Its worker processes start with the first one.

    Close the generator to end them: they do not react to SIGTERM, by which Python would end them at exit.
    """
    batches = iter(loader)
    with hold_signals():
        first = next(batches)
    yield first
    yield from batches


@contextlib.contextmanager
def streaming(loader: Loader) -> Iterator[Generator[Microbatch, None, None]]:
    """The stream of a loader, for a block at whose end its processes end.

    Raises:
        DataError: one of them was killed. torch says so by a signal, and raises wherever the block is by then.
    """
    try:
        with contextlib.closing(stream(loader)) as batches:
            yield batches
    except RuntimeError as error:
        if isinstance(error, MultiverseError) or not str(error).startswith("DataLoader worker"):
            raise
        raise lost_process(error, "the .bin files of data.data_prefixes") from error
