"""The engine that runs DeepSpeed's ZeRO: data parallel ranks share optimizer state, gradients and weights.

Data, tensor and context parallelism, as `config.parallel` says. The model, the loss and the optimizer are those of the
other engines: megatron-core's layers, and torch's fused AdamW, which ZeRO runs over this rank's part. DeepSpeed looks
at the gradient norm on the host, so each step waits for the device.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_multiverse.config import LayerConfig, ModelConfig, TrainConfig
from megatron_multiverse.model.cpu import device_neutral_cuda
from megatron_multiverse.parallel.ranks import current_ranks
from megatron_multiverse.training import sharded_state
from megatron_multiverse.training.deepspeed_settings import deepspeed_config
from megatron_multiverse.training.engine import StepResult
from megatron_multiverse.training.flops import peak_tflops
from megatron_multiverse.training.forward import arithmetic
from megatron_multiverse.training.gathered_model import save_gathered
from megatron_multiverse.training.host_memory import HostMemory
from megatron_multiverse.training.metrics import MetricsWriter
from megatron_multiverse.training.microbatches import Loader, Microbatch
from megatron_multiverse.training.optim import (
    NonFiniteGuard,
    build_optimizer,
    build_scheduler,
    warn_of_another_schedule,
)
from megatron_multiverse.training.phases import PhaseClock
from megatron_multiverse.training.pipeline import PlacedMicrobatch, place, reduced, tokens_of_step
from megatron_multiverse.training.placement import Placers, TokenPlacer
from megatron_multiverse.training.start import create_chunks
from megatron_multiverse.training.validation import TagCounter, Validation
from megatron_multiverse.training.zero_state import ZeroState, whole_shapes, whole_weight, write_partitioned
from megatron_multiverse.weight_names import is_extra_state


class MegatronGroups:
    """megatron-core's groups under the names by which DeepSpeed asks for them (its `mpu`).

    Context parallel ranks count as data parallel ones: both have the same weights and gradients to be added up.
    """

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)

    @staticmethod
    def get_data_parallel_rank() -> int:
        """This rank among those that share a ZeRO state."""
        return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))

    @staticmethod
    def get_data_parallel_world_size() -> int:
        """Ranks that share a ZeRO state."""
        return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))

    @staticmethod
    def get_data_parallel_group() -> Any:
        """Their process group."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)


def build_zero_engine(
    config: TrainConfig, model_config: ModelConfig, device: torch.device, loader: Loader, valid_loader: Loader | None
) -> ZeroEngine:
    """Build the model, with ZeRO 3 each parameter cut as soon as it is made, and DeepSpeed's engine around it.

    Raises:
        ConfigError: what `config` asks for cannot run here.
    """
    deepspeed = _import_deepspeed(device)
    settings = deepspeed_config(config, on_gpu=device.type == "cuda")
    with contextlib.ExitStack() as stack:
        write = None
        if config.deepspeed.zero_stage == 3:
            # A group that is given is that of the parameters; DeepSpeed takes none of one rank.
            group = MegatronGroups.get_data_parallel_group() if current_ranks().size > 1 else None
            options: dict[str, Any] = {"data_parallel_group": group, "tensor_overrides": [], "mpu": MegatronGroups}
            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=settings, **options))
            write = write_partitioned
        (model,), layers = create_chunks(config, model_config, device, write)
    with whole_shapes(model):
        optimizer = build_optimizer(model, config.optim)
    assert isinstance(optimizer, torch.optim.AdamW), "TrainConfig lets no other implementation through"
    zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=MegatronGroups)
    return ZeroEngine(config, zero, model, optimizer, model_config, layers, loader, valid_loader)


def _import_deepspeed(device: torch.device) -> Any:
    """The package, quiet, and told where it runs; it would look for MPI otherwise."""
    os.environ.setdefault("LOCAL_RANK", "0")  # one process without a launcher
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # It would compile, for 40 s, collectives over shared memory that only its inference uses.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


class ZeroEngine:
    """See `TrainEngine`. megatron-core's process groups must have the sizes of `config.parallel`.

    Args:
        config: the run.
        zero: what `deepspeed.initialize` returned.
        model: this tensor parallel rank's part of the model.
        optimizer: torch's AdamW, whose parameters are ZeRO's flat ones by now.
        model_config: shape of the whole model, vocabulary without padding.
        layers: how its layers are computed, without any "auto".
        loader: where the microbatches of `step` come from.
        valid_loader: where those of `validate` come from, if there are any.
    """

    def __init__(
        self,
        config: TrainConfig,
        zero: Any,
        model: Any,
        optimizer: torch.optim.AdamW,
        model_config: ModelConfig,
        layers: LayerConfig,
        loader: Loader,
        valid_loader: Loader | None = None,
    ) -> None:
        self.config, self.zero, self.model, self.optimizer = config, zero, model, optimizer
        self.model_config, self.layers = model_config, layers
        self.device, self.ranks = torch.device(zero.device), current_ranks()
        self.peak_tflops = peak_tflops(self.device, config.dtype, config.log.peak_tflops, devices=self.ranks.size)
        self.scheduler = build_scheduler(optimizer, config.optim, config.train_iters)
        self._state = ZeroState(zero, model, optimizer, MegatronGroups.get_data_parallel_group())
        self.clock = PhaseClock(self.device)
        self._guard = NonFiniteGuard(self.device)
        malformed = config.data.malformed
        self._placers = Placers(loader, valid_loader, self.device, layers.attention_backend, malformed)

    @property
    def learning_rate(self) -> float:
        """See `TrainEngine.learning_rate`."""
        return float(self.optimizer.param_groups[0]["lr"])

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """See `TrainEngine.running`."""
        with arithmetic(self.config), device_neutral_cuda(self.device):
            yield

    def step(self, microbatches: Sequence[Microbatch]) -> StepResult:
        """See `TrainEngine.step`."""
        self.scheduler.step(1)
        loss_tokens, tokens = tokens_of_step(self.ranks, microbatches)
        # DeepSpeed divides the sum of the gradients by the number of ranks.
        scale = MegatronGroups.get_data_parallel_world_size() / max(1, loss_tokens)
        sums = self._no_sums(2)
        for number, batch in enumerate(microbatches, 1):
            self.clock.begin("forward")
            placed = self._place(batch, self._placers.train)
            loss_sum = self._loss_sum(placed)
            self.clock.begin("backward")
            self.zero.backward(loss_sum * scale, scale_wrt_gas=False)
            sums += self._counted(loss_sum.detach(), placed)
            if number == len(microbatches):
                reduced(sums)
                self._stop_unless(bool(torch.isfinite(sums[0])))
            self.clock.begin("optimizer")
            self.zero.step()
        self.clock.end()
        self._stop_unless(self.zero.was_step_applied())  # it skips an update whose gradient norm is not finite
        norm = torch.as_tensor(self.zero.get_global_grad_norm(), device=self.device)
        return StepResult(sums[0], loss_tokens, tokens, sums[1].long(), norm)

    def _stop_unless(self, is_finite: bool) -> None:
        """Raise what `check` would raise later; the host knows already, and so does every rank."""
        if not is_finite:
            self._guard.first_bad_step.fill_(self.scheduler.num_steps)
            self._guard.check()

    def _place(self, batch: Microbatch, placer: TokenPlacer) -> PlacedMicrobatch:
        parallel = self.config.parallel
        return place(batch, placer, parallel.cp_comm_type if parallel.context_parallel_size > 1 else None)

    def _loss_sum(self, batch: PlacedMicrobatch) -> Tensor:
        """Loss summed over the trained tokens of one microbatch on this rank."""
        per_token = self.zero(
            batch.input_ids,
            batch.position_ids,
            attention_mask=None,
            labels=batch.labels,
            packed_seq_params=batch.params,
        )
        loss_sum: Tensor = (per_token * batch.loss_mask).sum()
        return loss_sum

    def _no_sums(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=self.device)

    def _counted(self, loss_sum: Tensor, batch: PlacedMicrobatch) -> Tensor:
        """[loss, visible pairs] that this rank adds to the sums over all ranks."""
        return torch.stack([loss_sum.double() * self._counts(), batch.visible_pairs.double()])

    def _counts(self) -> bool:
        """Whether this rank adds to sums over all ranks what its tensor parallel ranks know alike."""
        return int(parallel_state.get_tensor_model_parallel_rank()) == 0

    @torch.no_grad()
    def validate(self, microbatches: Iterable[Microbatch]) -> Validation:
        """See `TrainEngine.validate`."""
        batches, sums = list(microbatches), self._no_sums(3)
        count, _ = tokens_of_step(self.ranks, batches)
        self.zero.eval()
        with TagCounter([self.model], self._placers.valid.tag_ids) as tags:
            for batch in batches:
                placed = self._place(batch, self._placers.valid)
                sums[0] += self._loss_sum(placed) * self._counts()
                sums[1:] += tags.count(placed.labels, placed.loss_mask) * self._counts()
        self.zero.train()
        return Validation.of_sums(reduced(sums), count)

    def check(self, metrics: MetricsWriter) -> None:
        """See `TrainEngine.check`."""
        self._placers.report(self.scheduler.num_steps, metrics)

    def state(self, *, is_loading: bool = False, host: HostMemory | None = None) -> dict[str, Any]:
        """See `TrainEngine.state`. Loading asks for no tensor here: `load` reads them one after the other."""
        if is_loading:
            return {}
        with whole_shapes(self.model):
            model = sharded_state.model_state(self.model)
        weights, moments = self._state.sharded(model, host or HostMemory())
        return {
            "model": weights,
            "optimizer": moments,
            "extra_states": {key: value for key, value in model.items() if is_extra_state(key)},
            "other_spec": sharded_state.missing_extra_states(self.model, model),
            "optimizer_step": sharded_state.adamw_steps(self.optimizer),
            "opt_param_scheduler": self.scheduler.state_dict(),
        }

    def load(self, state: dict[str, Any], folder: Path) -> None:
        """See `TrainEngine.load`."""
        self._state.load(folder, self.model_config, state["optimizer_step"])
        warn_of_another_schedule(self.scheduler, state["opt_param_scheduler"])
        self.scheduler.load_state_dict(state["opt_param_scheduler"])

    def save_model(self, folder: Path) -> None:
        """See `TrainEngine.save_model`."""
        save_gathered([self.model], self.model_config, folder, self.ranks, whole=whole_weight)
