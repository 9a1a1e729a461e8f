"""The engine over many ranks: megatron-core's schedules, gradient reduction and distributed optimizer.

Tensor, sequence, pipeline (also interleaved), context and data parallelism, as `config.parallel` says. One rank runs,
too. Nothing in a step waits for the device but what a pipeline waits for by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from megatron_multiverse.config import LayerConfig, ModelConfig, TrainConfig
from megatron_multiverse.model.cpu import cuda_is_cpu
from megatron_multiverse.parallel.ranks import current_ranks
from megatron_multiverse.training import sharded_state
from megatron_multiverse.training.distributed_adamw import DistributedAdamW
from megatron_multiverse.training.engine import StepResult
from megatron_multiverse.training.flops import peak_tflops
from megatron_multiverse.training.forward import LossFunction, arithmetic
from megatron_multiverse.training.gathered_model import save_gathered
from megatron_multiverse.training.host_memory import HostMemory
from megatron_multiverse.training.metrics import MetricsWriter
from megatron_multiverse.training.microbatches import Documents, Microbatch
from megatron_multiverse.training.optim import NonFiniteGuard, build_scheduler, warn_of_another_schedule
from megatron_multiverse.training.phases import PhaseClock
from megatron_multiverse.training.pipeline import reduced, run_schedule, tokens_of_step
from megatron_multiverse.training.placement import Placers, TokenPlacer
from megatron_multiverse.training.validation import TagCounter, Validation
from megatron_multiverse.weight_names import is_extra_state


class MegatronEngine:
    """See `TrainEngine`. megatron-core's process groups must have the sizes of `config.parallel`.

    Args:
        config: the run.
        chunks: this rank's part of the model, on its device: one model, or several with an interleaved pipeline.
        model_config: shape of the whole model, vocabulary without padding.
        layers: how its layers are computed, without any "auto".
        loader: where the microbatches of `step` come from.
        valid_loader: where those of `validate` come from, if there are any.
        loss: what `step` differentiates; default: the model's own loss at the labels. See `run_schedule`.
    """

    def __init__(
        self,
        config: TrainConfig,
        chunks: Sequence[Any],
        model_config: ModelConfig,
        layers: LayerConfig,
        loader: Documents,
        valid_loader: Documents | None = None,
        loss: LossFunction | None = None,
    ) -> None:
        self.config, self.models, self.model_config, self.layers = config, list(chunks), model_config, layers
        weight = next(chunks[0].parameters())
        self.device, self.ranks = weight.device, current_ranks()
        self.peak_tflops = peak_tflops(self.device, config.dtype, config.log.peak_tflops, devices=self.ranks.size)
        with cuda_is_cpu(self.device):
            self.chunks = [wrapped(model, first=number == 0) for number, model in enumerate(self.models)]
            self.optimizer = DistributedAdamW(self.chunks, config.optim, weight.dtype)
        self.clock = PhaseClock(self.device)
        self._connect()
        self._loss = loss
        self.scheduler = build_scheduler(self.optimizer.adamw, config.optim, config.train_iters)
        self._guard = NonFiniteGuard(self.device)
        malformed = config.data.malformed
        self._placers = Placers(loader, valid_loader, self.device, layers.attention_backend, malformed)

    def _connect(self) -> None:
        """Tell megatron-core's schedules how to treat this model; they read it from the model's config."""
        interleaved = len(self.chunks) > 1
        for model in self.models:
            core = model.config
            core.calculate_per_token_loss = True  # gradients come divided already, see pipeline._loss
            core.finalize_model_grads_func = partial(_finalize, self.clock)
            core.deallocate_pipeline_outputs = True
            # gloo mixes up batched sends and receives; megatron-core's interleaved schedule does not batch on GPUs, too
            core.batch_p2p_comm = self.device.type == "cuda" and not interleaved
            if self.chunks[0].ddp_config.overlap_grad_reduce:
                no_sync = [chunk.no_sync for chunk in self.chunks]
                core.no_sync_func = no_sync if interleaved else no_sync[0]

    @property
    def learning_rate(self) -> float:
        """See `TrainEngine.learning_rate`."""
        return float(self.optimizer.adamw.param_groups[0]["lr"])

    @property
    def model(self) -> Any:
        """See `TrainEngine.model`."""
        return self.models[0]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """See `TrainEngine.running`."""
        with arithmetic(self.config), cuda_is_cpu(self.device):
            yield

    def step(self, microbatches: Sequence[Microbatch]) -> StepResult:
        """See `TrainEngine.step`."""
        self.scheduler.step(1)
        loss_tokens, tokens = tokens_of_step(self.ranks, microbatches)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        scale = 1 / max(1, loss_tokens)
        sums = self._run(
            microbatches, self._placers.train, scale, forward_only=False, loss=self._loss, clock=self.clock
        )
        loss_sum, pairs, *_ = reduced(sums)
        self.clock.begin("optimizer")
        grad_norm = self.optimizer.clip_gradients()
        self._guard.watch(self.optimizer.adamw, self.scheduler.num_steps, loss_sum, grad_norm)
        self.optimizer.step()
        self.clock.end()
        return StepResult(loss_sum, loss_tokens, tokens, pairs.long(), grad_norm)

    def _run(self, microbatches: Sequence[Microbatch], placer: TokenPlacer, scale: float, **options: Any) -> Tensor:
        parallel = self.config.parallel
        comm_type = parallel.cp_comm_type if parallel.context_parallel_size > 1 else None
        return run_schedule(self.chunks, microbatches, placer, scale, comm_type=comm_type, **options)

    @torch.no_grad()
    def validate(self, microbatches: Iterable[Microbatch]) -> Validation:
        """See `TrainEngine.validate`."""
        batches = self._whole_turns(list(microbatches))
        count, _ = tokens_of_step(self.ranks, batches)
        with TagCounter(self.models, self._placers.valid.tag_ids) as tags:
            sums = reduced(self._run(batches, self._placers.valid, 1.0, tags=tags, forward_only=True))
        return Validation.of_sums(sums[[0, 2, 3]], count)

    def _whole_turns(self, batches: list[Microbatch]) -> list[Microbatch]:
        """As many microbatches as an interleaved pipeline takes: a validation set may end before. None of those added
        counts."""
        turn = self.config.parallel.pipeline_model_parallel_size if len(self.chunks) > 1 else 1
        uncounted = {**batches[-1], "loss_mask": torch.zeros_like(batches[-1]["loss_mask"])}
        return batches + [uncounted] * (-len(batches) % turn)

    def check(self, metrics: MetricsWriter) -> None:
        """See `TrainEngine.check`."""
        self._guard.check()
        self._placers.report(self.scheduler.num_steps, metrics)

    def state(self, *, is_loading: bool = False, host: HostMemory | None = None) -> dict[str, Any]:
        """See `TrainEngine.state`."""
        models = {str(number): sharded_state.model_state(model) for number, model in enumerate(self.models)}
        weights, moments = self.optimizer.sharded_state(models, None if is_loading else host or HostMemory())
        if is_loading:
            return {"model": weights, "optimizer": moments}
        extras = {
            name: {key: value for key, value in model.items() if is_extra_state(key)} for name, model in models.items()
        }
        other = {
            name: sharded_state.missing_extra_states(model, models[name])
            for name, model in zip(models, self.models, strict=True)
        }
        return {
            "model": weights,
            "optimizer": moments,
            "extra_states": extras,
            "other_spec": other,
            "optimizer_step": sharded_state.adamw_steps(self.optimizer.adamw),
            "opt_param_scheduler": self.scheduler.state_dict(),
        }

    def load(self, state: dict[str, Any], folder: Path) -> None:
        """See `TrainEngine.load`."""
        self.optimizer.load(state["model"], state["optimizer"], state["optimizer_step"])
        warn_of_another_schedule(self.scheduler, state["opt_param_scheduler"])
        self.scheduler.load_state_dict(state["opt_param_scheduler"])

    def save_model(self, folder: Path) -> None:
        """See `TrainEngine.save_model`."""
        save_gathered(self.models, self.model_config, folder, self.ranks)


def wrapped(model: Any, *, first: bool) -> DistributedDataParallel:
    """A chunk of the model with its gradients in float32 buffers, reduced while the backward pass still runs.

    Args:
        model: the chunk.
        first: whether it is the first of this rank; only its gradients are reduced in several parts.
    """
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    model.config.calculate_per_token_loss = True  # sums over ranks, no means
    return DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=ranks > 1, use_distributed_optimizer=True
        ),
        model,
        disable_bucketing=not first,
    )


def _finalize(clock: PhaseClock, chunks: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Reduce the gradients over ranks. The token count that the schedule hands over is not used: see pipeline._loss."""
    clock.begin("grad_reduce")
    finalize_model_grads(chunks, None, **kwargs)
