"""Lets megatron-core run where there is no CUDA. Does nothing on a machine with CUDA, unless asked for a CPU tensor.

megatron-core calls torch.cuda in places that have nothing to do with a GPU. `device_neutral_cuda` replaces
those calls for the length of a `with` block and puts the originals back. What is replaced, and who needs it:

| call                       | replacement   | needed by                                              |
|----------------------------|---------------|--------------------------------------------------------|
| torch.cuda.current_device  | the CPU       | dist_checkpointing (state_dict_saver), gather of qkv   |
| torch.cuda.current_stream  | nothing       | gradient buffers of megatron-core 0.19 and later       |
| torch.cuda.synchronize     | nothing       | dist_checkpointing (filesystem_async), pipeline p2p    |
| torch.Tensor.cuda          | the tensor    | GPTModel with tied embeddings over pipeline stages     |

`cuda_is_cpu` goes further, for training over gloo ranks: megatron-core's schedules, gradient buffers and distributed
optimizer make tensors with `device="cuda"` and compare type names with "torch.cuda.FloatTensor", and its layers keep
states of CUDA's random generators under sequence parallelism. It costs a few microseconds for each call of torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as mcore_random
from torch.overrides import TorchFunctionMode


def _patches() -> list[tuple[Any, str, Callable[..., Any]]]:
    """(owner, attribute, replacement) for every call that is made device-neutral."""
    return [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "current_stream", lambda *args, **kwargs: None),
        (torch.cuda, "synchronize", lambda *args, **kwargs: None),
        (torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor),
    ]


@contextlib.contextmanager
def device_neutral_cuda(device: torch.device | None = None) -> Iterator[None]:
    """Make megatron-core's torch.cuda calls harmless inside the block, on machines without CUDA only.

    Args:
        device: where the tensors of the block are; for the CPU the calls are replaced on any machine.
    """
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        yield
        return
    with contextlib.ExitStack() as undo:
        for owner, name, replacement in _patches():
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


@contextlib.contextmanager
def cuda_is_cpu(device: torch.device) -> Iterator[None]:
    """Inside the block, in this thread, CUDA means the CPU to megatron-core. Does nothing if `device` is a GPU."""
    if device.type == "cuda":
        yield
        return
    replaced = [
        (torch.cuda, "manual_seed", lambda seed: None),
        (torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (mcore_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (mcore_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)),
    ]
    with device_neutral_cuda(device), contextlib.ExitStack() as undo:
        for owner, name, replacement in replaced:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        undo.enter_context(_CudaIsCpu())
        yield


class _CudaIsCpu(TorchFunctionMode):
    """Tensors asked for on CUDA are made on the CPU, and the type names of tensors say CUDA."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.", 1)
        return result
