"""TensorBoard and Weights & Biases: the numbers of metrics.jsonl once more, for those who watch runs there.

Both go on as one run when a run is resumed: TensorBoard by its folder, Weights & Biases by an id that lies in the run
folder. Neither package is needed unless the config asks for it.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_multiverse.config import LogConfig
from megatron_multiverse.errors import ConfigError

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb_run_id"


class Tracker(Protocol):
    """Where numbers of steps go."""

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of one step, by name."""
        ...

    def close(self) -> None:
        """Nothing follows."""
        ...


class TensorBoard:
    """Event files in the run folder.

    Args:
        folder: the run folder.
        step: of the checkpoint from which the run goes on; what an interrupted run wrote after it is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        make: Any = SummaryWriter
        self._writer = make(str(folder / TENSORBOARD_FOLDER), purge_step=step + 1)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Tracker.add`."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """See `Tracker.close`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; WANDB_MODE and the like are read by the package itself.

    Args:
        folder: the run folder.
        project: where the run appears.
        config: settings that are shown with it.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        package: Any = wandb
        file = folder / WANDB_ID_FILE
        if not file.is_file():
            file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        run_id = file.read_text(encoding="utf-8").strip()
        self._run = package.init(
            project=project, id=run_id, resume="allow", name=folder.name, dir=str(folder), config=dict(config)
        )
        self._run.define_metric("*", step_metric="step")  # a resumed run repeats steps; the package's own may not

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Tracker.add`."""
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        """See `Tracker.close`."""
        self._run.finish()


def check_trackers(log: LogConfig) -> None:
    """Raise ConfigError if a package that the config asks for is not installed."""
    asked = {"tensorboard": log.tensorboard, "wandb": log.wandb_project is not None}
    settings = {"tensorboard": "log.tensorboard true", "wandb": f"log.wandb_project {log.wandb_project}"}
    for package, is_asked in asked.items():
        if is_asked and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{settings[package]} needs the package {package}, which is not installed: pip install {package}, or "
                "leave the setting out"
            )


def open_trackers(log: LogConfig, folder: Path, step: int, config: Mapping[str, Any]) -> list[Tracker]:
    """Those that the config asks for.

    Args:
        log: says which.
        folder: the run folder.
        step: at which the run starts or goes on.
        config: the settings of the run.
    """
    trackers: list[Tracker] = []
    if log.tensorboard:
        trackers.append(TensorBoard(folder, step))
    if log.wandb_project is not None:
        trackers.append(WeightsAndBiases(folder, log.wandb_project, config))
    return trackers
