"""When a checkpoint is written: while the loop waits, or beside the next steps (`checkpoint.async_save`)."""

from __future__ import annotations

import logging
import time

from megatron_multiverse.training.checkpoint import TrainState
from megatron_multiverse.training.description import RunDescription
from megatron_multiverse.training.metrics import MetricsWriter
from megatron_multiverse.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


class Saver:
    """Saves a run. All ranks call the same methods at the same steps.

    At most one checkpoint is being written at a time. Each that comes into force is a line of the log and one of
    metrics.jsonl, `"kind": "checkpoint"`, with the seconds from its begin until it was in force (`save_s`), and those
    of them in which the loop stood still (`wait_s`). The latter count until the state was copied and writers ran
    (`begin_s`), what came when all was written (`finish_s`), and the rest of the writing where the next save or the
    end of the run came before. Parts on the first rank: gathering the state from the ranks (`gather_s`), planning
    (`plan_s`), copying from the GPU (`copy_s`), starting the writers (`fork_s`), and the slowest of them (`write_s`).

    Args:
        run: its folder.
        state: what is saved.
        description: of the run.
        metrics: where the times go.
    """

    def __init__(self, run: RunFolder, state: TrainState, description: RunDescription, metrics: MetricsWriter) -> None:
        self._run, self._state, self._description, self._metrics = run, state, description, metrics
        self._began = self._waited_s = 0.0

    def save(self) -> None:
        """Save the state as it is now. In the background this waits for the checkpoint before and for the copy alone.

        Raises:
            CheckpointError: this checkpoint, or the one before, cannot be written; the last one in force stays so.
        """
        is_async = self._run.config.async_save
        if (before := self._run.saving_step) is not None and not self._run.is_written():
            logger.warning(
                "step %d is to be saved while step %d is still being written: training waits for it; raise "
                "checkpoint.save_interval, or save to a faster disk",
                self._state.step,
                before,
            )
        self.finish()
        self._began = time.perf_counter()
        self._run.begin_save(self._state, self._description)
        self._waited_s = time.perf_counter() - self._began
        if not is_async:
            self.finish()

    def look(self) -> float:
        """Put a checkpoint in force whose files are written by now; called after every step.

        Returns:
            Seconds for which this kept the loop, 0 if there was nothing to do.

        Raises:
            CheckpointError: it cannot be written; the last one in force stays so.
        """
        if self._run.saving_step is None or not self._run.is_written():
            return 0.0
        return self.finish()

    def finish(self) -> float:
        """Wait until the checkpoint that is being written is in force, if there is one.

        Returns:
            Seconds that this took.

        Raises:
            CheckpointError: it cannot be written; the last one in force stays so.
        """
        step = self._run.saving_step
        if step is None:
            return 0.0
        started = time.perf_counter()
        target = self._run.finish_save()
        took = time.perf_counter() - started
        wait_s, save_s = self._waited_s + took, time.perf_counter() - self._began
        parts = {"begin_s": self._waited_s, **self._run.seconds}
        self._metrics.write("checkpoint", step, wait_s=wait_s, save_s=save_s, **parts)
        if self._run.config.async_save:
            logger.info("saved %s in %.1f s, in which training waited %.1f s", target, save_s, wait_s)
        else:
            logger.info("saved %s in %.1f s", target, save_s)
        return took
