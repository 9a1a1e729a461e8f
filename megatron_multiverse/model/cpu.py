"""Lets megatron-core run where there is no CUDA. Does nothing on a machine with CUDA, unless asked for a CPU tensor.

megatron-core calls torch.cuda in places that have nothing to do with a GPU. `device_neutral_cuda` replaces
those calls for the length of a `with` block and puts the originals back. What is replaced, and who needs it:

| call                       | replacement   | needed by                                              |
|----------------------------|---------------|--------------------------------------------------------|
| torch.cuda.current_device  | the CPU       | dist_checkpointing (state_dict_saver), gather of qkv   |
| torch.cuda.synchronize     | nothing       | dist_checkpointing (filesystem_async), pipeline p2p    |
| torch.Tensor.cuda          | the tensor    | GPTModel with tied embeddings over pipeline stages     |

megatron-core's pipeline schedules and distributed optimizer, which are not used yet, also need `device="cuda"` to mean
the CPU on gloo ranks: a TorchFunctionMode, entered in every thread, which would belong beside `_patches`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def _patches() -> list[tuple[Any, str, Callable[..., Any]]]:
    """(owner, attribute, replacement) for every call that is made device-neutral."""
    return [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
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
