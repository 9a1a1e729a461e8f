"""What is done to an engine as a whole, and on all its ranks: other weights, memory given back and taken again."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
from collections.abc import Iterator
from typing import Any

import torch

from megatron_multiverse.checkpoints.sources import weights_fingerprint
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.server.rank_messages import PartlyChanged, tell
from megatron_multiverse.server.rank_model import RankModel
from megatron_multiverse.server.weight_checks import CheckAction

logger = logging.getLogger(__name__)

WEIGHTS, CACHE = "weights", "kv_cache"
REGIONS = (WEIGHTS, CACHE)
"""What memory can be given back of, by SGLang's names."""
MOST_NAMED = 5
"""Tensors that an error names."""


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
            PartlyChanged: not all weights could be replaced.
        """
        self._check_weights()
        with self._changing({"op": "load", "folder": folder}):
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
            PartlyChanged: not all could be put into the model.
        """
        groups = self._part.groups
        groups.check_name(name)
        try:
            self._check_weights()
            groups.check_tensors(tensors)
        except GenerationError:
            self.leave(name)
            raise
        with self._changing({"op": "receive", "name": name, "tensors": tensors, "options": options}):
            self._received |= groups.receive(name, tensors, **options)
        parts = "\n".join([self._loaded, *(f"{key} {digest}" for key, digest in sorted(self._received.items()))])
        self.weights = hashlib.sha256(parts.encode()).hexdigest()[:16]
        self._use(version or str(len(self.versions)), is_more=version == self.versions[-1])

    def check(self, action: CheckAction) -> None:
        """Find out whether weights arrive that a trainer sends, see `WeightChecks`.

        Raises:
            GenerationError: the weights differ from the snapshot, or there is none; answers are in work that would go
                on with random weights.
            PartlyChanged: not all weights could be made random.
        """
        self._check_weights()
        if action == "reset_tensors":
            self._reset()
            return
        with self._on_all_ranks({"op": "check", "action": action}):
            different = self._part.check(action)
        if different:
            raise GenerationError(
                f"{len(different)} tensors differ from the snapshot (megatron-core's names): "
                f"{', '.join(different[:MOST_NAMED])}{', ...' if len(different) > MOST_NAMED else ''}"
            )

    def _reset(self) -> None:
        if self.has_work:
            raise GenerationError(
                "answers are in work, which would go on with random weights; wait for them, or call abort_request with "
                "abort_all"
            )
        with self._changing({"op": "check", "action": "reset_tensors"}):
            self._part.check("reset_tensors")
        self._use_unknown("reset_tensors")

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

    @contextlib.contextmanager
    def _changing(self, message: dict[str, Any]) -> Iterator[None]:
        """`_on_all_ranks` for what changes weights: where that fails midway, they are not what they were called."""
        try:
            with self._on_all_ranks(message):
                yield
        except PartlyChanged:
            logger.exception("weights were changed in part only")
            self._use_unknown("partly_changed")
            raise

    def _use_unknown(self, version: str) -> None:
        """Go on with weights that are those of no checkpoint and no trainer."""
        self._loaded = self.weights = secrets.token_hex(8)
        self._received = {}
        self._use(version)

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
