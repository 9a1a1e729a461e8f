"""The seam between the training loop and what computes a step: `TrainEngine`.

`trainer.train` decides when something happens: which microbatches make a step, when to log, validate, save and stop.
An engine decides how it is computed and owns everything that this needs: model, gradients, optimizer, learning rate,
precision, devices and ranks. There are three: `one_process.OneProcessEngine`; `megatron.MegatronEngine`, which runs
megatron-core's pipeline schedules, its DistributedDataParallel and its distributed optimizer; and `zero.ZeroEngine`,
which runs DeepSpeed's ZeRO. In all engines the numbers that leave a member are those of the whole run, the same on
every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_multiverse.config import LayerConfig, ModelConfig, TrainConfig
from megatron_multiverse.training.host_memory import HostMemory
from megatron_multiverse.training.metrics import MetricsWriter
from megatron_multiverse.training.microbatches import Loader, Microbatch
from megatron_multiverse.training.phases import PhaseClock
from megatron_multiverse.training.validation import Validation


@dataclass(frozen=True)
class LossSums:
    """Sums over the microbatches of one step. Tensors are scalars that stay on the device."""

    loss_sum: Tensor
    """Sum of the loss over all trained tokens."""
    loss_tokens: int
    """Trained tokens."""
    tokens: int
    """All tokens, padding included."""
    visible_pairs: Tensor
    """(query, key) pairs that attention computed, per layer and head."""

    @property
    def loss(self) -> Tensor:
        """Mean loss over the trained tokens: what is differentiated."""
        return self.loss_sum / max(1, self.loss_tokens)


@dataclass(frozen=True)
class StepResult(LossSums):
    """What one optimizer step did, summed over all ranks."""

    grad_norm: Tensor
    """Norm of the whole gradient before clipping."""


class TrainEngine(Protocol):
    """Computes training steps for `trainer.train`, and knows the state that they change."""

    @property
    def layers(self) -> LayerConfig:
        """How the layers are computed, with every "auto" replaced by what runs; the run records this."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the tensors of a StepResult are: this rank's device."""
        ...

    @property
    def peak_tflops(self) -> float | None:
        """Peak of all devices of the run together in TFLOP/s, for the MFU; None if it is not known."""
        ...

    @property
    def clock(self) -> PhaseClock:
        """Times the phases of every `step` on this rank, from "forward" to the end of the update."""
        ...

    @property
    def learning_rate(self) -> float:
        """The one used by the last step."""
        ...

    @property
    def model(self) -> nn.Module:
        """This rank's part of the model with the weights of the last step; of an interleaved pipeline its first chunk,
        of a model that ZeRO 3 has cut up no weights."""
        ...

    def running(self) -> contextlib.AbstractContextManager[None]:
        """What holds from the first step of the run to its last weight written: arithmetic settings of this process.

        The process groups of several ranks exist already, and outlive it.
        """
        ...

    def step(self, microbatches: Sequence[Microbatch]) -> StepResult:
        """One optimizer step: learning rate, forward, backward, clipping, update, gradients cleared.

        The loss is the mean over the trained tokens of all microbatches of all ranks. From the first step on whose
        loss or gradient is not finite, no step updates a weight; `check` tells. Does not wait for the device,
        except with DeepSpeed, which looks at the gradient norm itself, so that the step raises what `check` would.

        Megatron: forward and backward are `get_forward_backward_func()`, the gradients are reduced by
        DistributedDataParallel, clipping and update are the distributed optimizer's. DeepSpeed: its engine's
        `backward` and `step`, once per microbatch. Both reduce the number of trained tokens first.

        Args:
            microbatches: those of this data parallel rank, on the host; see `Microbatch`.
        """
        ...

    def validate(self, microbatches: Iterable[Microbatch]) -> Validation:
        """Mean loss and share of correct tags of the microbatches of all ranks.

        Changes no weight and no random generator, and waits for the device.
        """
        ...

    def check(self, metrics: MetricsWriter) -> None:
        """Find out what the steps since the last call left on the device; waits for it.

        Each document that was trained as plain text is named in `metrics`. With several ranks all of them call this,
        and the documents are gathered on the one that writes metrics.

        Raises:
            TrainingError: a loss or gradient was not finite, or a document should have been refused.
        """
        ...

    def state(self, *, is_loading: bool = False, host: HostMemory | None = None) -> dict[str, Any]:
        """All that the steps change, for megatron-core's `dist_checkpointing`: sharded tensors and plain values.

        Tensors are placed in the whole model, so that a checkpoint fits other parallel sizes and other engines. This
        rank's part alone is given: Megatron takes it from the model's and the optimizer's `sharded_state_dict`,
        with DeepSpeed the ranks take turns in collecting a parameter from all of them.

        Args:
            is_loading: the tensors are about to be filled from a checkpoint, which need not hold what only other
                engines or layers ask for.
            host: where to copy tensors that are put together for this; they are complete after its `wait`. Other
                tensors may be those of the engine, which the next step changes. Default: memory of its own.
        """
        ...

    def load(self, state: dict[str, Any], folder: Path) -> None:
        """Take over what a checkpoint holds: the tensors of `state(is_loading=True)`, filled, and the plain values.

        Every rank gets its own part of the tensors and the same plain values. Megatron hands them to the model's and
        the optimizer's `load_state_dict`; with DeepSpeed the ranks take turns in reading the tensors from `folder`.

        Args:
            state: may hold more than this engine's part.
            folder: where it comes from, for error messages.

        Raises:
            CheckpointError: the weights do not fit the model.
        """
        ...

    def save_model(self, folder: Path) -> None:
        """Write the weights alone; with several ranks each gives its part.

        Args:
            folder: made if it is missing; files of an earlier save in it are replaced.
        """
        ...


class EngineFactory(Protocol):
    """Builds the engine of a run."""

    def __call__(
        self, config: TrainConfig, model_config: ModelConfig, loader: Loader, valid_loader: Loader | None
    ) -> TrainEngine:
        """An engine at step 0.

        Args:
            config: the run.
            model_config: shape of the model that `config` asks for.
            loader: where the microbatches of `step` come from; tells how structure is written and names documents.
            valid_loader: the same for `validate`.

        Raises:
            ConfigError: what `config` asks for cannot run here.
        """
        ...
