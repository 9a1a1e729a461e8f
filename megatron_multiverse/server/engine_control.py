"""What is done to an engine as a whole, and on all its ranks: other weights, memory given back and taken again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import distributed, nn

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.checkpoints.sources import weights_fingerprint
from megatron_multiverse.config import LayerConfig
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.step.runner import Runner
from megatron_multiverse.model.weights import copy_weights
from megatron_multiverse.parallel.ranks import Ranks, current_ranks
from megatron_multiverse.server.garbage import freeze_objects

logger = logging.getLogger(__name__)

WEIGHTS, CACHE = "weights", "kv_cache"
REGIONS = (WEIGHTS, CACHE)
"""What memory can be given back of, by SGLang's names."""


class RankModel:
    """This rank's part of the model, and what can be done to it while no step runs. All ranks do the same.

    Args:
        model: the part.

    Attributes:
        device: where it computes, also while its weights lie elsewhere.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
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
        self._part = RankModel(engine.runner.model)
        self._options = {"vocab_size": engine.runner.vocab_size, "detokenize": engine.intake.detokenize}
        self._options |= {"max_position": engine.max_position}
        self._structure_vocab, self._config = engine.intake.vocab, engine.config
        self.released: set[str] = set()
        """Of `REGIONS`."""
        self.versions = ["default"]
        """Names of the weights that were in use, by `Engine.weight_version`."""
        self.weights = weights_fingerprint(folder)
        """A hash of those that are in use, which their name need not tell from others."""

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
        if WEIGHTS in self.released:
            raise GenerationError("the weights' memory was given back; resume_memory_occupation comes first")
        if self._engine is not None:
            self._engine.runner.release_ranks()
        tell({"op": "load", "folder": folder})
        try:
            self._part.load(folder)
        finally:
            if self._engine is not None:
                tell({"op": "follow"})
        self.weights = weights_fingerprint(folder)
        self.versions.append(version or str(len(self.versions)))
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


def follow_control(model: nn.Module) -> None:
    """What every other rank does: run the plans of the first, and in between what it says, until it says "end".

    Args:
        model: this rank's part.
    """
    part = RankModel(model)
    runner: Runner | None = None
    freeze_objects()
    op, message = "follow", dict[str, Any]()
    while op != "end":
        if op == "load":
            try:
                part.load(message["folder"])
            except Exception:
                logger.exception("the weights stay as they are")
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


def tell(message: dict[str, Any]) -> None:
    """On the first rank: say something to all others, as msgpack over the host."""
    if current_ranks().size > 1:
        data = msgpack.packb(message)
        distributed.broadcast(torch.tensor([len(data)]), 0)
        distributed.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0)


def hear() -> dict[str, Any]:
    """On the others: what the first rank says."""
    size = torch.zeros(1, dtype=torch.int64)
    distributed.broadcast(size, 0)
    data = torch.empty(int(size), dtype=torch.uint8)
    distributed.broadcast(data, 0)
    message: dict[str, Any] = msgpack.unpackb(bytes(data.numpy()))
    return message
