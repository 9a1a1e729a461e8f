"""Training batches of packed documents, shuffled per epoch, resumable to the batch.

The order of packs depends on seed and epoch alone. All ranks take their microbatches from the same stretch of
`micro_batch_size x data_parallel_size` neighbouring packs (`packs_per_microbatch`), each its own part of it. The state
counts packs, so a run may resume on another number of ranks and sees the same packs in the same order. With the tail
"continue" the packs of all epochs are one sequence: which of them make a step depends on its size alone, not on ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_multiverse.data.mixture import Mixture
from megatron_multiverse.data.packing import Overlong, Packing, pack
from megatron_multiverse.data.sft_dataset import SFTDataset, pack_arrays
from megatron_multiverse.errors import CheckpointError, ConfigError, DataError, MultiverseError

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]
Tail = Literal["drop", "continue", "pad"]


class SFTLoader:
    """Endless (or `epochs` long) stream of microbatches of one data-parallel rank.

    Iterating goes on where the state stands: after `load_state_dict`, and also when a second iterator is made.

    Each batch holds, with b = micro_batch_size and s = seq_length: ``input_ids``, ``labels``, ``position_ids``
    int64 [b, s], ``loss_mask`` float32 [b, s], ``r`` int32 [b, s]; with D documents, ``documents`` int32 [b, D, 2],
    ``sample_ids`` int64 [b, D], ``malformed`` bool [b, D]; see `pack_arrays`. D is the same for all batches of an
    epoch: room for its fullest pack and padding, rounded up to a power of two; of two epochs, for both.

    Args:
        dataset: the documents.
        seq_length: tokens per sequence.
        micro_batch_size: sequences per batch.
        pad: id of the padding token.
        seed: seed of all shuffles.
        data_parallel_rank: which part of each stretch of packs this loader yields, from 0.
        data_parallel_size: number of such parts.
        num_workers: processes that parse and pack ahead of time; 0 does it in this one.
        epochs: passes over the data; None never ends.
        tail: what happens to the packs at the end of an epoch that do not give every rank a microbatch: "drop" leaves
            them out, "continue" adds the first packs of the next epoch (rows of padding after the last one), "pad" rows
            of padding.
        overlong: documents longer than `seq_length`: "refuse" raises, "drop" leaves them out and logs how many.
        train_forced_tokens: also train on what the engine forces.
        mixture: which documents an epoch has; default all, in every epoch.

    Raises:
        DataError: overlong documents, or none at all.
        ConfigError: an epoch has too few packs for one microbatch on every rank, and `tail` is "drop".
    """

    def __init__(
        self,
        dataset: SFTDataset,
        *,
        seq_length: int,
        micro_batch_size: int,
        pad: int,
        seed: int = 1234,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        num_workers: int = 0,
        epochs: int | None = None,
        tail: Tail = "drop",
        overlong: Overlong = "refuse",
        train_forced_tokens: bool = False,
        mixture: Mixture | None = None,
    ) -> None:
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ConfigError(f"data_parallel_rank ({data_parallel_rank}) must be in [0, {data_parallel_size})")
        self.dataset = dataset
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = data_parallel_rank
        self.packs_per_microbatch = micro_batch_size * data_parallel_size  # over all ranks
        self.num_workers = num_workers
        self.epochs = epochs
        self.tail = tail
        self.overlong = overlong
        self.mixture = mixture
        self._packer = _PackDataset(dataset, seq_length, pad, train_forced_tokens)
        self._epoch = 0
        self._consumed = 0  # packs of this epoch, over all ranks
        self._packings: dict[int, Packing] = {}  # of the epochs last asked for
        self._pack(0)
        if too_long := int((dataset.lengths > seq_length).sum()):
            logger.warning(
                "%d of %d documents are longer than seq_length (%d) and are dropped",
                too_long, len(dataset), seq_length,
            )  # fmt: skip

    @property
    def epoch(self) -> int:
        """Number of the pass the next batch belongs to, from 0."""
        return self._epoch

    @property
    def tag_ids(self) -> tuple[int, ...]:
        """The ids in which structure is written, in the order of `structure.TAGS`."""
        return self.dataset.structure_vocab.tag_ids

    def sample_name(self, sample_id: int) -> str:
        """Prefix and number of a document named in ``sample_ids``."""
        return self.dataset.name(sample_id)

    def sample_problem(self, sample_id: int) -> str | None:
        """Why the structure of a document was not read, None if it was."""
        return self.dataset[sample_id].problem

    def count_packs(self, epochs: int) -> int:
        """Packs of the first epochs, before any tail."""
        return sum(len(self._pack(epoch).packs) for epoch in range(epochs))

    @property
    def fill(self) -> float:
        """Share of token places of the current epoch that is not padding."""
        return self._pack(self._epoch).fill

    def __iter__(self) -> Iterator[Batch]:
        schedule = _Schedule(self, self._epoch, self._consumed)
        # Workers prefetch, so the schedule is ahead of what is yielded here. A second walk over it, which takes one
        # step for each batch that is yielded, gives the position to save.
        states = schedule.walk()
        # Without a generator of its own, each new DataLoader iterator would draw a number from the global one, and
        # dropout would then differ between a resumed run and one that was never interrupted.
        loader: Any = DataLoader(
            self._packer,
            batch_size=None,
            sampler=schedule,
            num_workers=self.num_workers,
            # A thread then takes the next batch over from its worker while the GPU is busy; without it each step waits
            # some milliseconds for that (3 to 5 on an H200 machine, results/training_beside_transformers_h200.md).
            pin_memory=self.num_workers > 0 and torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )
        batches = iter(loader)
        try:
            while (batch := self._next(batches)) is not None:
                if isinstance(batch, MultiverseError):
                    raise batch
                _, self._epoch, self._consumed, _ = next(states)
                yield batch
        finally:
            _end_workers(batches)

    def _next(self, batches: Iterator[Any]) -> Any:
        """The next batch, None at the end.

        Raises:
            DataError: a loader process is gone. What torch says of that is often what its socket said.
        """
        try:
            return next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            if not self.num_workers:
                raise
            files = ", ".join(f"{prefix}.bin" for prefix in self.dataset.prefixes)
            raise lost_process(error, files) from error

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: after the last batch that was yielded. The same on all ranks."""
        state = {
            "epoch": self._epoch,
            "consumed_packs": self._consumed,
            "seed": self.seed,
            "seq_length": self.seq_length,
            "documents": self.dataset.fingerprint(),
        }
        if self.mixture is not None:
            state["mixture"] = [self.mixture.num_structured, *self.mixture.shares]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which `state` was taken.

        Raises:
            CheckpointError: the state belongs to other data, another mixture, seed or sequence length.
        """
        mine, names = self.state_dict(), ("seed", "seq_length", "documents", "mixture")
        differing = [name for name in names if state.get(name) != mine.get(name)]
        if differing:
            what = ", ".join(f"{name}: saved {state.get(name)}, now {mine.get(name)}" for name in differing)
            raise CheckpointError(
                f"the data position cannot be resumed ({what}): give the data and settings of the run. To go on from "
                "its weights with others, start a new run: another checkpoint.save, and this run's folder as init_from"
            )
        self._epoch, self._consumed = state["epoch"], state["consumed_packs"]

    def _pack(self, epoch: int) -> Packing:
        if epoch not in self._packings:
            lengths, length = self.dataset.lengths, self.seq_length
            mixed = None if self.mixture is None else self.mixture.documents(self.seed, epoch)
            packing = pack(
                lengths,
                length,
                seed=self.seed,
                epoch=epoch,
                overlong=self.overlong,
                documents=mixed,
                name=self.sample_name,
            )
            if len(packing.packs) < self.packs_per_microbatch and self.tail == "drop":
                raise ConfigError(
                    f"epoch {epoch} has {len(packing.packs)} packs, fewer than micro_batch_size x data_parallel_size "
                    f"({self.packs_per_microbatch}); make the batch or seq_length smaller, or set tail to continue"
                )
            self._packings = {k: old for k, old in self._packings.items() if k == epoch - 1} | {epoch: packing}
        return self._packings[epoch]


def lost_process(error: BaseException, files: str) -> DataError:
    """What is said of a loader process that is gone.

    Args:
        error: what torch made of it.
        files: what it read.
    """
    said = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"a process that loads data ended ({said}): it was killed, as when memory runs out, or a file was cut off as "
        f"it was read ({files}). Look at both, then start again: a run goes on from its last checkpoint. Fewer "
        "num_workers take less memory"
    )


def _end_workers(batches: Any) -> None:
    """End the loader processes, which torch does when its iterator is collected: the traceback of an error keeps it
    alive. They do not react to SIGTERM, so that Python, which ends processes by it at exit, would wait for ever."""
    if end := getattr(batches, "_shutdown_workers", None):  # there is none where the batches are made in this process
        end()


class _Schedule:
    """The packs of each batch from a given point on, epoch after epoch."""

    def __init__(self, loader: SFTLoader, epoch: int, consumed: int) -> None:
        self._loader = loader
        self._start = (epoch, consumed)

    def __iter__(self) -> Iterator[tuple[list[list[int]], int]]:
        """What `_PackDataset` takes for each batch: its packs, and D, the number of documents it has room for."""
        for packs, _, _, most_documents in self.walk():
            yield packs, 1 << most_documents.bit_length()

    def walk(self) -> Iterator[tuple[list[list[int]], int, int, int]]:
        """This rank's packs of each batch, an empty one for a row of padding; the state after it, epoch and packs
        consumed; documents of the fullest pack of its epochs."""
        epoch, consumed = self._start
        size, first = self._loader.micro_batch_size, self._loader.rank * self._loader.micro_batch_size
        while True:
            packs, epoch, consumed, most_documents = self._stretch(epoch, consumed)
            if not packs:
                return
            packs += [[] for _ in range(self._loader.packs_per_microbatch - len(packs))]
            yield packs[first : first + size], epoch, consumed, most_documents

    def _stretch(self, epoch: int, consumed: int) -> tuple[list[list[int]], int, int, int]:
        """The packs of all ranks for a batch, fewer where they end; else as `walk` gives it."""
        loader, packs, most_documents = self._loader, list[list[int]](), 0
        while loader.epochs is None or epoch < loader.epochs:
            packing = loader._pack(epoch)
            part = packing.packs[consumed : consumed + loader.packs_per_microbatch - len(packs)]
            if part:
                packs, consumed = packs + part, consumed + len(part)
                most_documents = max(most_documents, packing.most_documents)
            if len(packs) == loader.packs_per_microbatch or (packs and loader.tail == "pad"):
                break
            if loader.tail == "drop":
                packs, most_documents = [], 0
            epoch, consumed = epoch + 1, 0
        return packs, epoch, consumed, most_documents


class _PackDataset(Dataset["Batch | MultiverseError"]):
    """Makes a batch from the document indices of its packs and its D; runs in loader workers.

    Errors in the data are returned as values. If they were raised, torch would bury their message in the traceback of
    the worker process.
    """

    def __init__(self, dataset: SFTDataset, seq_length: int, pad: int, train_forced_tokens: bool) -> None:
        self._dataset = dataset
        self._seq_length = seq_length
        self._pad = pad
        self._train_forced_tokens = train_forced_tokens

    def __getitem__(self, item: Any) -> Batch | MultiverseError:
        try:
            return self._batch(*item)
        except MultiverseError as error:
            return error

    def _batch(self, packs: list[list[int]], num_documents: int) -> Batch:
        rows = [
            pack_arrays(
                [self._dataset[document] for document in documents],
                self._seq_length,
                self._pad,
                num_documents=num_documents,
                train_forced_tokens=self._train_forced_tokens,
            )
            for documents in packs
        ]
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
