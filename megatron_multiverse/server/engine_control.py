"""What is done to an engine as a whole, and on all its ranks: other weights, memory given back and taken again."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.checkpoints.sources import weights_fingerprint
from megatron_multiverse.config import LayerConfig
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.step.runner import Runner
from megatron_multiverse.model.weights import copy_weights
from megatron_multiverse.parallel.ranks import Ranks, current_ranks
from megatron_multiverse.server.garbage import freeze_objects
from megatron_multiverse.server.rank_messages import hear, tell
from megatron_multiverse.server.weight_groups import WeightGroups

logger = logging.getLogger(__name__)

WEIGHTS, CACHE = "weights", "kv_cache"
REGIONS = (WEIGHTS, CACHE)
"""What memory can be given back of, by SGLang's names."""


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
        self.ranks: Ranks = current_ranks()
        weight = next(model.parameters())
        self.device, self._dtype = weight.device, weight.dtype

    def load(self, folder: str) -> None:
        """Replace the weights in place, once all ranks have read theirs: a folder that cannot be read changes none.

        Raises:
            Exception: what is wrong with the folder; GenerationError where another rank found it.
        """
        failure: Exception | None = None
        try:
            layers = LayerConfig(transformer_impl="local")  # the names of weights are the same for all kinds of layers
            new, _ = load_checkpoint(Path(folder), dtype=self._dtype, device="cpu", layers=layers)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            failure = error
        if self.ranks.any(failure is not None):
            raise failure or GenerationError("another rank could not read its part of the weights; its log says why")
        copy_weights(new, self.model)
        self.groups.forget()

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


class EngineControl:
    """An engine whose weights and memory can be changed between its steps; on the first rank.

    Args:
        engine: nobody else may keep it, or its memory is never given back.
        folder: the checkpoint that its weights are from.
    """

    def __init__(self, engine: Engine, folder: str) -> None:
        self._engine: Engine | None = engine
        self._part = RankModel(engine.runner.model, folder)
        self._options = {"vocab_size": engine.runner.vocab_size, "detokenize": engine.intake.detokenize}
        self._options |= {"max_position": engine.max_position}
        self._structure_vocab, self._config = engine.intake.vocab, engine.config
        self.released: set[str] = set()
        """Of `REGIONS`."""
        self.versions = ["default"]
        """Names of the weights that were in use, by `Engine.weight_version`."""
        self._loaded = self.weights = weights_fingerprint(folder)
        """A hash of those that are in use, which their name need not tell from others."""

        self._received: dict[str, str] = {}  # a hash of each tensor that has come from a trainer since

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            GenerationError: its memory was given back.
        """
        if self._engine is None:
            raise GenerationError("the engine has given its memory back; resume_memory_occupation takes it again")
        return self._engine

    @property
    def device(self) -> torch.device:
        """Where the first rank computes."""
        return self._part.device

    @property
    def incomplete(self) -> list[str]:
        """Tensors from trainers that wait for others of the same matrix."""
        return self._part.groups.incomplete

    @property
    def has_work(self) -> bool:
        """Whether the engine has something to do, or to hand out."""
        return self._engine is not None and self._engine.has_work

    def update(self, folder: str, version: str | None) -> None:
        """Go on with the weights of a checkpoint. Answers in work go on, too, from the text they have.

        Args:
            folder: of the checkpoint.
            version: what the weights are called from now on; by default their number.

        Raises:
            Exception: the folder cannot be read, or holds another model; nothing has changed then.
        """
        self._check_weights()
        with self._on_all_ranks({"op": "load", "folder": folder}):
            self._part.load(folder)
        self._loaded = self.weights = weights_fingerprint(folder)
        self._received = {}
        self._use(version or str(len(self.versions)))

    def join(self, **options: Any) -> None:
        """Join a trainer's group; the arguments are those of `WeightGroups.join`, which tells the errors."""
        with self._on_all_ranks({"op": "join", "options": options}):
            self._part.groups.join(**options)

    def leave(self, name: str) -> None:
        """Leave a trainer's group.

        Raises:
            GenerationError: there is none of that name.
        """
        self._part.groups.check_name(name)
        with self._on_all_ranks({"op": "leave", "name": name}):
            self._part.groups.leave(name)

    def receive(self, name: str, tensors: list[list[Any]], version: str | None, **options: Any) -> None:
        """Receive weights from a trainer and go on with them. Answers in work go on, too, from the text they have.

        Args:
            name: of the group. After an error it is left: the trainer may have sent what was not received.
            tensors: Hugging Face's name, dtype and shape of each, in the order of sending.
            version: what the weights are called from now on; by default their number.
            options: those of `WeightGroups.receive`.

        Raises:
            GenerationError, RankError: they cannot be weights of this model, or did not come; nothing has changed then.
        """
        groups = self._part.groups
        groups.check_name(name)
        try:
            self._check_weights()
            groups.check_tensors(tensors)
        except GenerationError:
            self.leave(name)
            raise
        with self._on_all_ranks({"op": "receive", "name": name, "tensors": tensors, "options": options}):
            self._received |= groups.receive(name, tensors, **options)
        parts = "\n".join([self._loaded, *(f"{key} {digest}" for key, digest in sorted(self._received.items()))])
        self.weights = hashlib.sha256(parts.encode()).hexdigest()[:16]
        self._use(version or str(len(self.versions)), is_more=version == self.versions[-1])

    def rename(self, version: str) -> None:
        """Call the weights that are in use by another name."""
        self.versions[-1] = version

    def _check_weights(self) -> None:
        if WEIGHTS in self.released:
            raise GenerationError("the weights' memory was given back; resume_memory_occupation comes first")

    @contextlib.contextmanager
    def _on_all_ranks(self, message: dict[str, Any]) -> Iterator[None]:
        """In the block the other ranks do what the message says; afterwards they follow the engine again."""
        if self._engine is not None:
            self._engine.runner.release_ranks()
        tell(message)
        try:
            yield
        finally:
            if self._engine is not None:
                tell({"op": "follow"})

    def _use(self, version: str, *, is_more: bool = False) -> None:
        """The weights have changed, or more of them have."""
        if not is_more:
            self.versions.append(version)
        if self._engine is not None:
            self._engine.use_weights(len(self.versions) - 1)

    def release(self, regions: set[str]) -> None:
        """Give memory back.

        Args:
            regions: of `REGIONS`.

        Raises:
            GenerationError: answers are in work.
        """
        if self._engine is not None:
            if self._engine.has_work:
                raise GenerationError("answers are in work; wait for them, or call abort_request with abort_all")
            self._engine.close()
            self._engine = None
        if WEIGHTS in regions - self.released:
            tell({"op": "offload"})
            self._part.offload()
        self.released |= regions
        tell({"op": "free"})
        self._part.free()

    def resume(self, regions: set[str]) -> None:
        """Take memory again; once nothing is released there is an engine."""
        if WEIGHTS in regions & self.released:
            tell({"op": "onload"})
            self._part.onload()
        self.released -= regions
        if self._engine is None and not self.released:
            tell({"op": "follow"})
            self._engine = Engine(self._part.model, self._structure_vocab, self._config, **self._options)  # type: ignore[arg-type]
            self._engine.use_weights(len(self.versions) - 1)

    def close(self) -> None:
        """Let the other ranks end."""
        if self._engine is not None:
            self._engine.close()
        tell({"op": "end"})


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
        if op in ("load", "join", "receive", "leave"):
            try:
                _follow_weights(part, op, message)
            except Exception:
                logger.exception("%s failed; the weights stay as they are", op)
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
    elif op == "receive":
        part.groups.receive(message["name"], message["tensors"], **message["options"])
    else:
        part.groups.leave(message["name"])
