"""Weights that trainers send over a process group, one for each trainer: joined, received from, left. On every rank.

A request's tensors are received and cut to this rank's part before any is used, so that it changes all or none. What
megatron-core keeps in one matrix (query, key and value; gate and up) is used once all of it has come, be it with
several requests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_multiverse.checkpoints.load import names_on_stage, part_of_rank
from megatron_multiverse.checkpoints.names.rules import merge
from megatron_multiverse.checkpoints.sources import open_checkpoint
from megatron_multiverse.config import pad_vocab_size
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.model.gpt import first_layer_of
from megatron_multiverse.model.mcore import tensor_parallel_place
from megatron_multiverse.model.weights import copy_tensors, weight_state
from megatron_multiverse.parallel.outside_group import GroupBackend, OutsideGroup
from megatron_multiverse.parallel.ranks import Ranks, current_ranks
from megatron_multiverse.server.rank_messages import change_weights

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
_HEAD, _OLD_BUFFER = "lm_head.weight", "rotary_emb.inv_freq"
_MARK = 0xA5
"""Stands in a buffer where nothing has been received. Weights do not hold it eight times in a row."""
_MARKED = 8
_SAMPLED = 4096
"""Numbers of a tensor that its hash sees: an optimizer's step changes nearly all of them."""


@dataclasses.dataclass(frozen=True)
class Sent:
    """A tensor as a trainer announces it."""

    name: str
    """Hugging Face's."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightNames:
    """What a model's tensors are called by Hugging Face, and what becomes of them on this rank.

    Args:
        model: this rank's part.
        folder: the checkpoint that it is from.
    """

    def __init__(self, model: Any, folder: str) -> None:
        source = open_checkpoint(folder)
        size = pad_vocab_size(source.config.vocab_size, tensor_parallel_place()[0])
        self._config = dataclasses.replace(source.config, vocab_size=size)
        self._entries = {name: entry for entry in source.entries() for name, _ in entry.hf}
        self._shapes = {name: shape for entry in source.entries() for name, shape in entry.hf}
        self._unused: set[str] = set()
        if source.config.share_embeddings_and_output_weights:  # some trainers send the tied embedding twice
            self._shapes |= {_HEAD: next(e.hf[0][1] for e in source.entries() if e.rule == "vocab")}
            self._unused.add(_HEAD)
        self._first_layer = first_layer_of(model)
        self._here = weight_state(model).keys()

    def check(self, tensors: Sequence[Sent]) -> None:
        """Raise GenerationError for what is no tensor of the model, has another shape, or comes twice."""
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise GenerationError("names: one is there twice; name each tensor once")
        for tensor in tensors:
            wanted = tensor.shape if tensor.name.endswith(_OLD_BUFFER) else self._shapes.get(tensor.name)
            if wanted is None:
                raise GenerationError(
                    f"names: the model has no {tensor.name!r}; send Hugging Face's names, e.g. "
                    f"{next(iter(self._shapes))!r}"
                )
            if tuple(wanted) != tensor.shape:
                raise GenerationError(
                    f"shapes: {tensor.name} is {list(wanted)} here, got {list(tensor.shape)}; send whole tensors"
                )

    def assemble(self, parts: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """This rank's weights by megatron-core's names, of those tensors that are complete; and the other tensors."""
        ready: dict[str, Tensor] = {}
        waiting: dict[str, Tensor] = {}
        for name, tensor in parts.items():
            entry = self._entries.get(name)
            if name in self._unused or entry is None:
                continue
            names = [other for other, _ in entry.hf]
            if not parts.keys() >= set(names):
                waiting[name] = tensor
            elif name == names[0]:
                own = [own for own in names_on_stage(entry, self._first_layer, self._config) if own in self._here]
                if own:  # other tensors belong to other stages
                    whole = merge(entry, [parts[other].to(tensor.device) for other in names], self._config)
                    ready |= dict.fromkeys(own, part_of_rank(entry, whole, self._config))
        return ready, waiting


class WeightGroups:
    """The groups that this rank is in. All ranks do the same at the same time.

    Args:
        model: this rank's part.
        folder: the checkpoint that it is from.
    """

    def __init__(self, model: nn.Module, folder: str) -> None:
        self._model, self._folder = model, folder
        self._names: WeightNames | None = None  # read with the first group: most servers have none
        self._ranks: Ranks = current_ranks()
        self._groups: dict[str, OutsideGroup] = {}
        self._waiting: dict[str, dict[str, Tensor]] = {}  # by group: parts of matrices that are not complete
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype

    def join(
        self,
        *,
        name: str,
        address: str,
        port: int,
        rank_offset: int,
        size: int,
        backend: GroupBackend,
        interface: str,
        seconds: float,
    ) -> None:
        """Join a trainer's group, in place of one that had its name.

        Args:
            name: of the group.
            address: host of the trainer's rank 0.
            port: its store's.
            rank_offset: the group's rank of the engine's first rank; the others follow.
            size: of the group.
            backend: nccl, where the model is on GPUs, or gloo.
            interface: of the network, for gloo.
            seconds: after which the trainer is given up.

        Raises:
            GenerationError: there is no room for all ranks, or the backend is another device's.
            CheckpointError: the folder of the model cannot be read any more.
            RankError: the trainer did not come.
        """
        if name in self._groups:
            self.leave(name)
        if not 0 < rank_offset <= size - self._ranks.size:
            raise GenerationError(
                f"rank_offset {rank_offset}, world_size {size}: the engine's {self._ranks.size} ranks do not fit in "
                "beside the trainer's rank 0; world_size is 1 and the ranks of all engines"
            )
        if backend == "nccl" and self._device.type != "cuda":
            raise GenerationError(f"backend: nccl is for GPUs, the model is on {self._device}; give gloo")
        failure: Exception | None = None
        place = {"rank": rank_offset + self._ranks.rank, "size": size, "device": self._device}
        options = {"name": name, "backend": backend, "seconds": seconds, "interface": interface}
        try:
            self._names = self._names or WeightNames(self._model, self._folder)
            self._groups[name] = OutsideGroup(address, port, **place, **options)  # type: ignore[arg-type]
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            failure = error
        if self._ranks.any(failure is not None):
            self.leave(name)
            raise failure or GenerationError("another rank could not join the group; its log says why")

    def leave(self, name: str) -> None:
        """Leave a group, and forget what waits for more from it."""
        group = self._groups.pop(name, None)
        self._waiting.pop(name, None)
        if group is not None:
            group.close()

    def forget(self) -> None:
        """All weights are others now: what has come in part does not go with them."""
        self._waiting.clear()

    @property
    def incomplete(self) -> list[str]:
        """Tensors that wait for others of the same matrix."""
        return [name for parts in self._waiting.values() for name in parts]

    def check_name(self, name: str) -> None:
        """Raise GenerationError unless there is a group of that name."""
        if name not in self._groups:
            known = f"there are {', '.join(self._groups)}" if self._groups else "there is none"
            raise GenerationError(f"group_name: no group {name!r}, {known}; init_weights_update_group comes first")

    def check_tensors(self, tensors: Sequence[Sequence[Any]]) -> None:
        """Raise GenerationError unless all are tensors of the model; see `receive`."""
        assert self._names is not None, "read when a group was joined"
        self._names.check(_sent(tensors))

    def receive(
        self, name: str, tensors: Sequence[Sequence[Any]], *, flattened: bool, seconds: float
    ) -> dict[str, str]:
        """Receive weights and put them into the model, once all ranks have all of them.

        Args:
            name: of the group; after an error it is left.
            tensors: name, dtype and shape of each.
            flattened: they come as one tensor of bytes, one after the other.
            seconds: after which the trainer is given up.

        Returns:
            A hash of each tensor's numbers.

        Raises:
            RankError: they did not come, or not whole; no weight has changed.
            GenerationError: so it was on another rank.
            PartlyChanged: they came, but not all could be put into the model; the group stays.
        """
        failure: Exception | None = None
        try:
            assert self._names is not None, "read when the group was joined"
            arrived = dict(self._arriving(self._groups[name], _sent(tensors), flattened, time.monotonic() + seconds))
            ready, waiting = self._names.assemble(self._waiting.get(name, {}) | arrived)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            failure = error
        if self._ranks.any(failure is not None):
            self.leave(name)
            raise failure or GenerationError("another rank did not receive the weights; its log says why")
        change_weights(lambda: copy_tensors(ready, self._model))
        self._waiting[name] = waiting
        return {key: _digest(tensor) for key, tensor in arrived.items()} if self._ranks.is_first else {}

    def _arriving(
        self, group: OutsideGroup, tensors: Sequence[Sent], flattened: bool, limit: float
    ) -> Iterator[tuple[str, Tensor]]:
        """Each tensor in the model's dtype; on its device, or on the CPU where all of them twice have no room there."""
        device = self._device if group.backend == "nccl" else torch.device("cpu")
        sizes = [tensor.num_bytes for tensor in tensors]
        staging = device if _free_bytes(device) > 2 * sum(sizes) else torch.device("cpu")
        if flattened:
            whole = _receive(group, Sent("", torch.uint8, (sum(sizes),)), device, limit)
            pieces = (piece.clone() for piece in whole.split(sizes))  # each where its dtype may begin
            received = (piece.view(one.dtype).view(one.shape) for piece, one in zip(pieces, tensors, strict=True))
        else:
            received = (_receive(group, tensor, device, limit) for tensor in tensors)
        for tensor, value in zip(tensors, received, strict=True):
            yield tensor.name, value.to(staging, self._dtype)


def _sent(tensors: Sequence[Sequence[Any]]) -> list[Sent]:
    unknown = {dtype for _, dtype, _ in tensors} - DTYPES.keys()
    if unknown:
        raise GenerationError(f"dtypes: {min(unknown)!r} is none of {', '.join(DTYPES)}; convert before sending")
    return [Sent(name, DTYPES[dtype], tuple(shape)) for name, dtype, shape in tensors]


def _receive(group: OutsideGroup, tensor: Sent, device: torch.device, limit: float) -> Tensor:
    """The next tensor of a group.

    gloo makes no error of it where another number of bytes comes than was announced. So there is room for twice as
    much (float32 announced as bfloat16), and marks tell what came.
    """
    size = tensor.num_bytes
    spare = size if group.backend == "gloo" else 0
    data = torch.empty(size + spare, dtype=torch.uint8, device=device)
    end = data[size - min(_MARKED, (size + 1) // 2) : size]
    behind = data[size : size + _MARKED]
    end.fill_(_MARK)
    behind.fill_(_MARK)
    group.broadcast(data if spare else data.view(tensor.dtype), limit - time.monotonic())
    if bool((end == _MARK).all()) or bool((behind != _MARK).any()):
        raise GenerationError(
            f"the trainer sent another number of bytes for {tensor.name or 'the bucket'} than the {size} that it "
            "announced; give the dtypes and shapes that are sent, in the order of sending"
        )
    return data[:size].view(tensor.dtype).view(tensor.shape)


def _free_bytes(device: torch.device) -> float:
    """Memory that can be taken; on a CPU it is not counted."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _digest(tensor: Tensor) -> str:
    flat = tensor.flatten()
    sample = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().view(torch.uint8).cpu()
    return hashlib.sha256(sample.numpy().tobytes()).hexdigest()
