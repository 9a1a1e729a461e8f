"""What a run reports: metrics.jsonl (always) and a log line, from numbers gathered on the device.

`StepMeter` adds up on the device. Only reading it waits for the device, and that happens at log steps.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.run_files import METRICS_FILE
from megatron_multiverse.config import LayerConfig, ModelConfig
from megatron_multiverse.errors import TrainingError
from megatron_multiverse.files import write_line
from megatron_multiverse.training.flops import training_flops
from megatron_multiverse.training.phases import PhaseClock
from megatron_multiverse.training.trackers import Tracker
from megatron_multiverse.training.validation import Validation

logger = logging.getLogger(__name__)

TRACKED = ("train", "valid")
"""Kinds of records whose numbers make curves."""


class StepMeter:
    """Sums since the last log line.

    Args:
        device: of the tensors that are added.
        clock: the engine's.
        num_ranks: ranks of the run.

    Attributes:
        has_trained: whether any token was trained since the process started.
    """

    def __init__(self, device: torch.device, clock: PhaseClock, num_ranks: int = 1) -> None:
        self.device, self.clock, self.num_ranks = device, clock, num_ranks
        self.has_trained = False
        self.reset()

    def reset(self) -> None:
        """Start the next interval now."""
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.visible_pairs = torch.zeros((), dtype=torch.int64, device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)
        self.steps = self.tokens = self.loss_tokens = self.untrained_steps = 0
        self.waited_s = 0.0
        self.clock.reset()
        self.started = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Do not count so much of the time until now as time of the steps."""
        self.started += seconds

    def add(self, loss_sum: Tensor, loss_tokens: int, tokens: int, visible_pairs: Tensor, grad_norm: Tensor) -> None:
        """Count one step. Tensors stay on the device."""
        self.loss_sum += loss_sum
        self.visible_pairs += visible_pairs
        self.grad_norm = grad_norm
        self.steps += 1
        self.tokens += tokens
        self.loss_tokens += loss_tokens
        self.untrained_steps += loss_tokens == 0
        self.has_trained |= loss_tokens > 0

    def check_trained(self, step: int) -> None:
        """Warn of steps since the last log line that trained no token; their updates are momentum and decay alone.

        Args:
            step: the last one.

        Raises:
            TrainingError: no step has trained any token.
        """
        if not self.has_trained:
            raise TrainingError(
                f"no token was trained up to step {step}: every response is empty. Preprocess with the column of the "
                "answers in --json-keys, and look at rows with tools/show_structure.py"
            )
        if self.untrained_steps:
            logger.warning("%d of the %d steps up to %d trained no token", self.untrained_steps, self.steps, step)

    def read(self, config: ModelConfig, peak_tflops: float | None) -> dict[str, float | None]:
        """Numbers of the interval, then start the next one. Waits for the device. No trained token: the loss is NaN.

        Args:
            config: shape of the model, for its FLOPs.
            peak_tflops: of all devices of the run together; None if it is not known, then there is no MFU.
        """
        loss = float(self.loss_sum) / self.loss_tokens if self.loss_tokens else math.nan
        seconds = time.perf_counter() - self.started
        tflops = training_flops(config, self.tokens, int(self.visible_pairs)) / seconds / 1e12
        numbers: dict[str, float | None] = {
            "loss": loss,
            "grad_norm": float(self.grad_norm),
            "step_time_s": seconds / max(1, self.steps),
            "data_wait_s": self.waited_s / max(1, self.steps),
            **self.clock.read(self.steps),
            "tokens_per_s": self.tokens / seconds,
            "tokens_per_s_per_rank": self.tokens / seconds / self.num_ranks,
            "loss_tokens": self.loss_tokens,
            "tflops": tflops,
            "mfu": None if peak_tflops is None else tflops / peak_tflops,
            "memory_gib": memory_gib(self.device),
        }
        self.reset()
        return numbers


def memory_gib(device: torch.device) -> float:
    """Memory of this process in GiB: on a GPU the most that its tensors took so far, else what is resident now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**30


class MetricsWriter:
    """Appends one JSON object per event to metrics.jsonl and writes log lines.

    Args:
        folder: the run folder; None writes nothing, for ranks that leave it to the first one.
        train_iters: steps of the whole run.
        trackers: where the numbers of steps go beside the file.
    """

    def __init__(self, folder: str | Path | None, train_iters: int, trackers: Sequence[Tracker] = ()) -> None:
        self.train_iters = train_iters
        self._trackers = trackers
        self._file: IO[str] | None = None
        if folder is not None:
            path = Path(folder) / METRICS_FILE
            end_unfinished_line(path)
            self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line {"kind", "step", "time", ...}; numbers that are not finite become null."""
        if self._file is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        record = {"kind": kind, "step": step, "time": time.time(), **clean}
        write_line(self._file, json.dumps(record))
        if kind in TRACKED:
            numbers = {f"{kind}/{name}": float(v) for name, v in clean.items() if isinstance(v, int | float)}
            for tracker in self._trackers:
                tracker.add(step, numbers)

    def start(self, step: int, resumed: bool, model: ModelConfig, layers: LayerConfig) -> None:
        """What runs from this step on; `layers` without any "auto"."""
        self.write(
            "start",
            step,
            resumed=resumed,
            parameters=model.num_parameters,
            transformer_impl=layers.transformer_impl,
            fp8=layers.fp8,
            fp8_recipe=layers.fp8_recipe if layers.fp8 else None,
            attention_backend=layers.attention_backend,
        )

    def train(self, step: int, numbers: dict[str, float | None], lr: float, consumed_samples: int) -> None:
        """A training interval, to the file and to the log."""
        eta_s = (numbers["step_time_s"] or 0.0) * (self.train_iters - step)
        self.write("train", step, lr=lr, eta_s=eta_s, consumed_samples=consumed_samples, **numbers)
        self._log(
            "step %d/%d | loss %s | lr %.3e | grad norm %.3f | %s | MFU %s | %.2f GiB | ETA %s",
            step, self.train_iters, format_loss(numbers["loss"]), lr, numbers["grad_norm"], format_speed(numbers),
            format_mfu(numbers["mfu"]), numbers["memory_gib"], format_duration(eta_s),
        )  # fmt: skip

    def valid(self, step: int, found: Validation) -> None:
        """A validation result, to the file and to the log."""
        self.write("valid", step, **dataclasses.asdict(found), tag_accuracy=found.tag_accuracy)
        tags = "" if found.tag_accuracy is None else f" | {100 * found.tag_accuracy:.1f} % of {found.tags} tags correct"
        self._log("step %d/%d | validation loss %s%s", step, self.train_iters, format_loss(found.loss), tags)

    def _log(self, line: str, *values: object) -> None:
        if self._file is not None:
            logger.info(line, *values)

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def end_unfinished_line(path: Path) -> None:
    """Give a line that a crash cut off its newline, so that the next record does not continue it."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def format_loss(loss: float | None) -> str:
    """Four decimals; "n/a" where no token was trained."""
    return "n/a" if loss is None or math.isnan(loss) else f"{loss:.4f}"


def format_mfu(mfu: float | None) -> str:
    """In percent; "n/a" where the peak of the devices is not known."""
    return "n/a" if mfu is None else f"{100 * mfu:.1f} %"


def format_speed(numbers: Mapping[str, float | None]) -> str:
    """Tokens per second of the run, and of each rank where there are several; numbers of `StepMeter.read`."""
    whole, own = numbers["tokens_per_s"] or 0.0, numbers["tokens_per_s_per_rank"] or 0.0
    return f"{whole:.0f} tokens/s" + (f", {own:.0f} per rank" if own < whole else "")


def format_duration(seconds: float) -> str:
    """1:02:03 for 3723 seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
