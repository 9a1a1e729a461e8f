"""The processes that write the shards of a preprocessing run."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from megatron_multiverse.child_processes import end_with_parent
from megatron_multiverse.data.counters import Progress
from megatron_multiverse.data.encoders import DifferentIds, Encoder
from megatron_multiverse.data.readers import Shard
from megatron_multiverse.data.shard_worker import Recipe, process_shard
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.data.work_folder import WorkFolder
from megatron_multiverse.errors import DataError
from megatron_multiverse.progress import ProgressLine

# Forked workers share the parent's tokenizer and counters; tasks find them here.
_worker_state: dict[str, Any] = {}


def _init_worker(
    recipe: Recipe,
    tokenizer: MultiverseTokenizer,
    encoder: Encoder,
    progress: Progress,
    folder: WorkFolder,
    parent: int,
) -> None:
    end_with_parent(parent)  # without it, a worker whose parent was killed would wait for tasks forever
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which stops its workers
    folder.unlock()
    _worker_state.update(recipe=recipe, tokenizer=tokenizer, encoder=encoder, progress=progress)


def _work(shard: Shard, path: Path) -> None:
    process_shard(shard, path, **_worker_state)


def run_workers(
    folder: WorkFolder,
    shards: Sequence[Shard],
    todo: Sequence[int],
    recipe: Recipe,
    tokenizer: MultiverseTokenizer,
    encoder: Encoder,
    workers: int,
) -> None:
    """Write shards into the work folder.

    Args:
        folder: held by this process.
        shards: all shards of the input.
        todo: numbers of the shards that are not finished.
        recipe: how rows become documents.
        tokenizer: shared by the workers, which are forked.
        encoder: likewise.
        workers: how many processes, at most.

    Raises:
        DifferentIds: the encoder was found to give other ids than the tokenizer.
        DataError: a shard cannot be read or written, or a worker was killed; finished shards are kept.
    """
    if not todo:
        return
    context = multiprocessing.get_context("fork")
    progress = Progress(context)
    arguments = (recipe, tokenizer, encoder, progress, folder, os.getpid())
    executor = ProcessPoolExecutor(min(workers, len(todo)), context, _init_worker, arguments)
    with executor:
        try:
            futures = {executor.submit(_work, shards[k], folder.part(k)): k for k in todo}
            waiting: set[Future[None]] = set(futures)
            # After the workers are forked: the progress bar has a thread, and a fork copies no threads.
            with ProgressLine("preprocess", sum(shards[k].num_bytes for k in todo), items="docs") as line:
                while waiting:
                    finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                    line.show(*progress.values)
                    for future in finished:
                        _check(future, shards[futures[future]], folder)
        except BaseException:
            # An error, or Ctrl-C: the workers stop after the batch they are at, and the others do not begin.
            progress.stop()
            executor.shutdown(cancel_futures=True)
            raise


def _check(future: Future[None], shard: Shard, folder: WorkFolder) -> None:
    """Pass a worker's error on at once, without waiting for the other shards."""
    error = future.exception()
    if error is None:
        return
    if isinstance(error, DifferentIds):
        raise error
    if isinstance(error, BrokenProcessPool):
        raise DataError(
            "a worker process was killed (out of memory?); finished shards are kept: run the same command again, "
            "with fewer --workers if memory is short"
        ) from error
    where = f"{shard.path} [{shard.start}, {shard.stop})"
    if isinstance(error, OSError):
        raise DataError(
            f"{where} cannot become a shard in {folder.path}: {error.strerror or error}; finished shards are kept: "
            "make room if the disk is full, and run the same command again"
        ) from error
    raise DataError(f"{where}: {error}") from error
