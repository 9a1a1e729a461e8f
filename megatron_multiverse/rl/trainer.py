"""The loop of reinforcement learning. Read `train` from top to bottom: everything a run does happens there.

It stands beside `training/trainer.py`: the same engines compute the updates, with another loss, and the same run folder
keeps the checkpoints. What is new lies between two updates: answers are drawn with the weights as they are, and graded.
Over several ranks each replica of the model draws and trains answers to its share of the prompts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from megatron_multiverse.checkpoints.run_files import MODEL_FOLDER
from megatron_multiverse.config import LayerConfig, ModelConfig, RLConfig
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.model.device import choose_device
from megatron_multiverse.parallel.ranks import Ranks
from megatron_multiverse.rl.drawing import drawing_of
from megatron_multiverse.rl.loss import PolicyLoss
from megatron_multiverse.rl.prompts import Prompts
from megatron_multiverse.rl.records import ROLLOUTS_FILE, keep_records_until, write_records
from megatron_multiverse.rl.replica import Replica
from megatron_multiverse.rl.report import log_line, step_numbers, update_numbers
from megatron_multiverse.rl.rollout import Batch, Group, Rollouts
from megatron_multiverse.rl.trees import Tree, answer_tree, join_trees, microbatches
from megatron_multiverse.training.checkpoint import TrainState
from megatron_multiverse.training.description import RunDescription
from megatron_multiverse.training.engine import TrainEngine
from megatron_multiverse.training.fused_adamw import check_optimizer
from megatron_multiverse.training.metrics import MetricsWriter, memory_gib
from megatron_multiverse.training.microbatches import Microbatch
from megatron_multiverse.training.one_process import OneProcessEngine
from megatron_multiverse.training.run_folder import RunFolder
from megatron_multiverse.training.saver import Saver
from megatron_multiverse.training.seeds import seed_everything
from megatron_multiverse.training.signals import StopSignals, listening
from megatron_multiverse.training.start import check_start, create_chunks, create_model, describe_model, joined_groups
from megatron_multiverse.training.trackers import check_trackers
from megatron_multiverse.training.trainer import (
    TrainResult,
    check_agreement,
    check_not_past,
    end_run,
    is_due,
    save_model,
    start_record,
)

logger = logging.getLogger(__name__)


def train(config: RLConfig, *, stop: StopSignals | None = None) -> TrainResult:
    """Train, or go on training if `checkpoint.save` holds a checkpoint.

    Args:
        config: the run.
        stop: signals that the caller listens to; default: those during the steps.

    Raises:
        CheckpointError: a checkpoint cannot be used, read or written.
        ConfigError: settings that do not fit together, the prompts or the checkpoint.
        DataError: the prompts cannot be read.
        TrainingError: the loss or the gradient is not finite, or an answer or a reward failed.
    """
    base = config.train_config()
    check_trackers(config.log)
    model_config, tokenizer = describe_start(config)
    with joined_groups(base) as ranks, RunFolder(config.checkpoint, ranks) as run, contextlib.ExitStack() as closing:
        check_not_past(config, run)
        learner = closing.enter_context(built_learner(config, model_config, tokenizer, ranks))
        engine, prompts = learner.engine, learner.prompts
        state = TrainState(engine, prompts)
        description = RunDescription(model_config, dataclasses.replace(config, layers=engine.layers), tokenizer)
        resumed = run.resume(state, description)
        metrics = start_record(description, run.folder if ranks.is_first else None, state.step, resumed)
        if ranks.is_first:
            keep_records_until(run.folder / ROLLOUTS_FILE, state.step)
        saver, saved = Saver(run, state, description, metrics), state.step

        stop = closing.enter_context(listening(stop))
        closing.enter_context(engine.running())
        is_stopping = ranks.any(bool(stop))
        while state.step < config.train_iters and not is_stopping:
            learned = learner.step(state.step, lambda: bool(stop), metrics)
            if learned is None:
                break  # a signal; a run that goes on draws these answers again

            batch, numbers = learned
            state.step += 1
            state.consumed_samples += numbers["answers"]
            saver.look()
            metrics.write("train", state.step, lr=engine.learning_rate, prompts=prompts.drawn, **numbers)
            if config.rollout.keep_records and ranks.is_first:
                write_records(run.folder / ROLLOUTS_FILE, batch, state.step, config.rollout.keep_records)
            is_stopping = ranks.any(bool(stop))
            last = state.step == config.train_iters or is_stopping
            if last or is_due(state.step, config.log.log_interval):
                logger.info(log_line(state.step, config.train_iters, numbers))
            if is_due(state.step, config.checkpoint.save_interval):
                saver.save()
                saved = state.step
        if saved != state.step:
            saver.save()
        saver.finish()

        finished = state.step >= config.train_iters
        if finished:  # inside the block, so that a signal does not cut the writing off
            save_model(state, description, run.folder / MODEL_FOLDER, ranks)
        return end_run(run, state.step, finished, stop, metrics)


@dataclass
class Learner:
    """What takes the steps of a run on this rank."""

    config: RLConfig
    tokenizer: MultiverseTokenizer
    prompts: Prompts
    engine: TrainEngine
    loss: PolicyLoss
    rollouts: Rollouts

    def step(
        self, number: int, is_stopping: Callable[[], bool], metrics: MetricsWriter
    ) -> tuple[Batch, dict[str, Any]] | None:
        """Draw and grade answers with the weights as they are, and learn from them.

        Args:
            number: steps done.
            is_stopping: whether to leave off while answers are drawn.
            metrics: where the engine reports what is wrong with an update.

        Returns:
            This replica's answers and the numbers of the step; None if it was left off.

        Raises:
            TrainingError: the loss or the gradient is not finite, or an answer or a reward failed.
        """
        config, engine, replica, began = self.config, self.engine, self.rollouts.replica, time.perf_counter()
        engine.clock.begin("weights")
        self.rollouts.use_weights(number)
        engine.clock.end()
        batch = self.rollouts.draw(self.prompts, number, is_stopping)
        if batch is None:
            return None
        started, updates = time.perf_counter(), []
        for part in parts_of(batch, config.policy.updates_per_step, replica):
            rows = rows_of(part, config, self.tokenizer, number) if replica.is_first else None
            result = engine.step(replica.from_first(rows))
            engine.check(metrics)
            updates.append((result, self.loss.take()))
        train_s = time.perf_counter() - started
        numbers = {**step_numbers(batch, replica), **update_numbers(updates)}
        numbers |= {"train_s": train_s, **engine.clock.read(1), "memory_gib": memory_gib(engine.device)}
        return batch, numbers | {"step_time_s": time.perf_counter() - began}


def describe_start(config: RLConfig) -> tuple[ModelConfig, MultiverseTokenizer]:
    """Shape and tokenizer of the model to train, held against the settings before ranks join and weights are loaded.

    Raises:
        CheckpointError: the model is not at hand.
        ConfigError: settings that do not fit together or to the model.
    """
    base = config.train_config()
    model_config = describe_model(base, "policy.seq_length")
    check_optimizer(base, choose_device(config.device))
    tokenizer = build_tokenizer(config.task.tokenizer_type, config.tokenizer_model)
    check_start(base, tokenizer, learns_from_answers=True)
    return model_config, tokenizer


@contextlib.contextmanager
def built_learner(
    config: RLConfig, model_config: ModelConfig, tokenizer: MultiverseTokenizer, ranks: Ranks
) -> Iterator[Learner]:
    """What takes the steps, at the start of the run; its cache is let go of at the end.

    Args:
        config: the run.
        model_config: shape of the model.
        tokenizer: of the model.
        ranks: all of the run, divided into its parallel groups.

    Raises:
        CheckpointError: the weights cannot be read.
        ConfigError: settings that do not fit together, to the prompts or between ranks.
        DataError: the prompts cannot be read.
    """
    seed_everything(config.seed)
    prompts, replica = Prompts(config.task, tokenizer, config.seed), Replica.of(ranks)
    check_agreement(config, prompts, ranks)
    drawing = drawing_of(config, model_config, tokenizer, prompts, replica.count)  # before weights are loaded
    engine, model, loss = build_engine(config, model_config, tokenizer, prompts)
    rollouts = Rollouts(config, model, model_config, engine.layers, tokenizer, drawing, replica)
    with contextlib.closing(rollouts):
        yield Learner(config, tokenizer, prompts, engine, loss, rollouts)


def build_engine(
    config: RLConfig, model_config: ModelConfig, tokenizer: MultiverseTokenizer, prompts: Prompts
) -> tuple[TrainEngine, nn.Module, PolicyLoss]:
    """What computes the updates, the model that it trains (this rank's part), and the loss.

    Raises:
        ConfigError: what the config asks for cannot run here.
    """
    base, device = config.train_config(), choose_device(config.device)

    def create() -> tuple[nn.Module, LayerConfig]:
        if base.runs_on == "megatron":
            (model,), layers = create_chunks(base, model_config, device)
            return model, layers
        return create_model(base, model_config, device)

    model, layers = create()
    reference = create()[0].requires_grad_(False) if config.policy.kl_coef else None
    loss = PolicyLoss(config.policy, tokenizer.vocab_size, device, reference)
    if base.runs_on == "megatron":
        from megatron_multiverse.training.megatron import MegatronEngine

        return MegatronEngine(base, [model], model_config, layers, prompts, loss=loss), model, loss
    return OneProcessEngine(base, model, model_config, layers, prompts, loss=loss), model, loss


def parts_of(batch: Batch, count: int, replica: Replica) -> list[list[Group]]:
    """The groups to learn from, divided among `count` updates, the parts of all replicas together as equal as can be.

    No update is empty, but this replica's part of it may be.
    """
    useful = sorted(replica.all_of([group.number for group in batch.useful]))
    if not useful:
        return []
    borders: list[int] = np.linspace(0, len(useful), min(count, len(useful)) + 1).round().astype(int).tolist()
    return [
        [group for group in batch.useful if useful[start] <= group.number <= useful[end - 1]]
        for start, end in itertools.pairwise(borders)
    ]


def rows_of(groups: list[Group], config: RLConfig, tokenizer: MultiverseTokenizer, step: int) -> list[Microbatch]:
    """The answers of some groups as the microbatches of one update."""
    policy, limits = config.policy, config.rollout.engine.limits_of(config.rollout.sampling)
    trees: list[Tree] = []
    for group in groups:
        own = [
            answer_tree(result, advantage, tokenizer.structure_vocab, **limits)
            for result, advantage in zip(group.results, group.advantages.tolist(), strict=True)
        ]
        trees += join_trees(own, len(group.prompt.ids), policy.seq_length) if policy.share_prefix else own
    return microbatches(trees, policy.seq_length, policy.micro_batch_size, tokenizer.pad, seed=config.seed, step=step)
