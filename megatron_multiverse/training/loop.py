"""What a step of training consists of, and what is done between two of them. When: `trainer.train` says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice

from megatron_multiverse.config import ModelConfig, TrainConfig
from megatron_multiverse.parallel.ranks import Ranks
from megatron_multiverse.training.checkpoint import TrainState
from megatron_multiverse.training.engine import TrainEngine
from megatron_multiverse.training.metrics import MetricsWriter, StepMeter
from megatron_multiverse.training.microbatches import Loader, Microbatch
from megatron_multiverse.training.saver import Saver
from megatron_multiverse.training.stragglers import Stragglers

Observer = Callable[[TrainEngine, int, MetricsWriter], None]
"""Called with the engine, the step and the metrics."""


class Loop:
    """The parts of the loop. They measure: what is no step does not count as time of the steps.

    Args:
        config: the run.
        model_config: shape of its model.
        state: engine, data and position, which each step moves on.
        metrics: where numbers go.
        saver: of checkpoints.
        ranks: those of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        state: TrainState,
        metrics: MetricsWriter,
        saver: Saver,
        ranks: Ranks,
    ) -> None:
        self.config, self.model_config, self.state, self.metrics, self.saver = (
            config, model_config, state, metrics, saver,
        )  # fmt: skip
        self.engine = state.engine
        self.meter = StepMeter(self.engine.device, self.engine.clock, ranks.size)
        self.stragglers = Stragglers(ranks, config.log.straggler_percent)

    def step(self, batches: Iterator[Microbatch]) -> None:
        """Train on the next microbatches, and look after a checkpoint that is being written.

        Args:
            batches: the training data, from where the run stands.

        Raises:
            CheckpointError: the checkpoint that is being written cannot be; the last one in force stays so.
            DataError: a file of the data was cut off while the run reads it.
        """
        waiting = time.perf_counter()
        microbatches = [next(batches) for _ in range(self.config.num_microbatches)]
        self.meter.waited_s += time.perf_counter() - waiting

        result = self.engine.step(microbatches)
        self.state.step += 1
        self.state.consumed_samples += self.config.data.global_batch_size
        self.meter.add(result.loss_sum, result.loss_tokens, result.tokens, result.visible_pairs, result.grad_norm)
        self.meter.leave_out(self.saver.look())

    def log(self) -> None:
        """Write down the numbers of the steps since the last time; collective.

        Raises:
            TrainingError: the loss or the gradient is not finite, or no token is trained.
        """
        step = self.state.step
        self.engine.check(self.metrics)
        self.meter.check_trained(step)
        numbers = self.meter.read(self.model_config, self.engine.peak_tflops)
        self.metrics.train(step, numbers, self.engine.learning_rate, self.state.consumed_samples)
        self.stragglers.look(step, numbers)

    def validate(self, loader: Loader) -> None:
        """Validate on the same microbatches every time; the training data and the generators do not move.

        Args:
            loader: of the validation data; left at the place where it stood.

        Raises:
            DataError: a file of the data was cut off while the run reads it.
            TrainingError: a loss or gradient since the last check is not finite, or a document was to be refused.
        """
        position = loader.state_dict()
        found = self.engine.validate(islice(loader, self.config.eval_iters))
        loader.load_state_dict(position)
        self.engine.check(self.metrics)
        self.metrics.valid(self.state.step, found)
        self.meter.reset()

    def observe(self, observer: Observer) -> None:
        """Let the caller look at the model as it is now.

        Args:
            observer: of the caller; what it raises ends the run.
        """
        observer(self.engine, self.state.step, self.metrics)
        self.meter.reset()

    def save(self) -> None:
        """Write a checkpoint.

        Documents that were trained as plain text up to here are named in the metrics first: a run that goes on from the
        checkpoint starts behind them and would never name them.

        Raises:
            CheckpointError: this checkpoint, or the one before, cannot be written; the last one in force stays so.
            TrainingError: a loss or gradient since the last check is not finite, or a document was to be refused.
        """
        self.engine.check(self.metrics)
        self.saver.save()
        self.meter.reset()
