"""A rank's part of the model, and what is done to it while no plans run: on the first rank by `EngineControl`, on the
others by what that tells them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config import LayerConfig
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.step.runner import Runner
from megatron_multiverse.model.weights import copy_weights
from megatron_multiverse.parallel.ranks import Ranks, current_ranks
from megatron_multiverse.server.garbage import freeze_objects
from megatron_multiverse.server.rank_messages import change_weights, hear
from megatron_multiverse.server.weight_checks import CheckAction, WeightChecks
from megatron_multiverse.server.weight_groups import WeightGroups

logger = logging.getLogger(__name__)


class RankModel:
    """This rank's part of the model, and what can be done to it while no step runs. All ranks do the same.

    Args:
        model: the part.
        folder: the checkpoint that it is from.

    Attributes:
        device: where it computes, also while its weights lie elsewhere.
    """

    def __init__(self, model: nn.Module, folder: str) -> None:
        self.model = model
        self.groups = WeightGroups(model, folder)
        self._checks = WeightChecks(model)
        self.ranks: Ranks = current_ranks()
        weight = next(model.parameters())
        self.device, self._dtype = weight.device, weight.dtype

    def load(self, folder: str) -> None:
        """Replace the weights in place, once all ranks have read theirs: a folder that cannot be read changes none.

        Raises:
            Exception: what is wrong with the folder; GenerationError where another rank found it.
            PartlyChanged: it could be read, but not all weights replaced.
        """
        failure: Exception | None = None
        try:
            layers = LayerConfig(transformer_impl="local")  # the names of weights are the same for all kinds of layers
            new, _ = load_checkpoint(Path(folder), dtype=self._dtype, device="cpu", layers=layers)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            failure = error
        if self.ranks.any(failure is not None):
            raise failure or GenerationError("another rank could not read its part of the weights; its log says why")
        change_weights(lambda: copy_weights(new, self.model))
        self.groups.forget()

    def check(self, action: CheckAction) -> list[str]:
        """See `WeightChecks.run`; the tensors that differ on any rank, each once.

        Raises:
            GenerationError: there is no snapshot, or another rank failed.
            PartlyChanged: not all weights could be made random.
        """
        failure: Exception | None = None
        found: list[str] = []
        if action == "reset_tensors":
            self.groups.forget()  # else a part from before would complete a matrix that is sent without it
            change_weights(lambda: self._checks.run(action))
            return []
        try:
            found = self._checks.run(action)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            failure = error
        if self.ranks.any(failure is not None):
            raise failure or GenerationError(f"{action} failed on another rank; its log says why")
        return list(dict.fromkeys(name for names in self.ranks.gather(found) for name in names))

    def offload(self) -> None:
        """Give back the memory of the weights; on a CPU they stay where they are."""
        self.model.to("cpu")

    def onload(self) -> None:
        """Bring the weights back."""
        self.model.to(self.device)

    def free(self) -> None:
        """Return what nothing uses any more to the device."""
        freeze_objects()  # parts of an engine refer to each other, and some may be frozen
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def follow_control(model: nn.Module, folder: str) -> None:
    """What every other rank does: run the plans of the first, and in between what it says, until it says "end".

    Args:
        model: this rank's part.
        folder: the checkpoint that it is from.
    """
    part = RankModel(model, folder)
    runner: Runner | None = None
    freeze_objects()
    op, message = "follow", dict[str, Any]()
    while op != "end":
        if op in ("load", "join", "receive", "leave", "check"):
            try:
                _follow_weights(part, op, message)
            except Exception:
                logger.exception("%s failed", op)
        elif op == "follow":
            runner = runner or Runner(model, num_pages=0, page_size=0)
            runner.follow()
        elif op == "onload":
            part.onload()
        else:
            if runner is not None:
                runner.close()
                runner = None
            part.offload() if op == "offload" else part.free()
        message = hear()
        op = message["op"]


def _follow_weights(part: RankModel, op: str, message: dict[str, Any]) -> None:
    if op == "load":
        part.load(message["folder"])
    elif op == "join":
        part.groups.join(**message["options"])
    elif op == "check":
        part.check(message["action"])
    elif op == "receive":
        part.groups.receive(message["name"], message["tensors"], **message["options"])
    else:
        part.groups.leave(message["name"])
