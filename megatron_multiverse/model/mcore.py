"""Imports megatron-core quietly, and makes the process groups that it needs.

megatron-core warns at import about the optional packages it did not find (TransformerEngine, NVIDIA apex, absl), and
from 0.19 on, whenever a model is built, that GPTModel will be removed. We choose our parts ourselves, report missing
extras where they matter and build models in one module, so these warnings are silenced. `model/__init__.py` and
`training/__init__.py` import this module first, so no other import of megatron-core there comes before it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._distributed_c10d import HashStore

from megatron_multiverse.errors import ConfigError

# While it is imported torch looks for a compiler for GPUs and would warn, at every start, that there is no GPU.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda r: not r.getMessage().startswith("No CUDA runtime"))
logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(lambda r: "DEPRECATED" not in r.getMessage())

# megatron-core calls collectives by names that torch 2.13 is about to drop.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


_compile_now = torch.compile


def _compile_at_first_call(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """`torch.compile`, put off until the function is called: what compiles takes seconds to import."""
    if function is None:  # a decorator with options
        return functools.partial(_compile_at_first_call, **options)
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = _compile_now(function, **options)
        return compiled(*args, **kwargs)

    return call


@contextlib.contextmanager
def _compile_later() -> Iterator[None]:
    """What is decorated with `torch.compile` inside the block is compiled at its first call."""
    torch.compile = _compile_at_first_call  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = _compile_now


with warnings.catch_warnings(), _compile_later():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", message="Apex is not installed")
    warnings.filterwarnings("ignore", message="absl.logging is not installed")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import megatron.core
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
    from megatron.core import parallel_state as parallel_state
    from megatron.core import tensor_parallel as tensor_parallel


def ensure_parallel_state() -> None:
    """Give megatron-core the process groups it wants: one rank, in this process, unless they already exist.

    A program of several ranks calls `torch.distributed.init_process_group` and `set_parallel_sizes` itself before it
    builds a model. What is made here is destroyed when the process exits (NCCL warns otherwise).

    Raises:
        ConfigError: launched as one of several ranks without an initialised process group.
    """
    ensure_process_group()
    if not parallel_state.model_parallel_is_initialized():
        set_parallel_sizes(1, 1)


def ensure_process_group() -> None:
    """torch's process group, of one rank unless there is one already; see `ensure_parallel_state`."""
    if torch.distributed.is_initialized():
        return
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but no process group exists: call "
            "torch.distributed.init_process_group and parallel_state.initialize_model_parallel first"
        )
    if parallel_state.model_parallel_is_initialized():  # of a process group that somebody has destroyed since
        parallel_state.destroy_model_parallel()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    atexit.register(_destroy_own_group, torch.distributed.group.WORLD, os.getpid())


def data_parallel_rank() -> int:
    """Which of the groups that read rows of their own this rank belongs to; 0 without process groups."""
    return int(parallel_state.get_data_parallel_rank()) if parallel_state.model_parallel_is_initialized() else 0


def tensor_parallel_place() -> tuple[int, int]:
    """Number of tensor parallel ranks, and which of them this one is."""
    ensure_parallel_state()
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def mark_tensor_parallel(parameter: torch.nn.Parameter, dim: int) -> None:
    """Note on a parameter that each tensor parallel rank holds a part of it, cut along `dim`.

    Gradient norms count what is not marked once for all these ranks. megatron-core marks parameters only where it also
    draws their initial values.
    """
    for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(parameter, name):  # set_tensor_model_parallel_attributes refuses a second time
            delattr(parameter, name)
    tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def pipeline_parallel_size() -> int:
    """Number of pipeline stages."""
    ensure_parallel_state()
    return int(parallel_state.get_pipeline_model_parallel_world_size())


def set_parallel_sizes(tensor: int, pipeline: int, *, context: int = 1, virtual_pipeline: int = 1) -> None:
    """Divide the ranks of the process group into parallel groups anew.

    Args:
        tensor: tensor parallel size.
        pipeline: pipeline parallel size; the world size must be a multiple of `tensor * pipeline * context`.
        context: context parallel size.
        virtual_pipeline: chunks of layers on each pipeline stage.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
        context_parallel_size=context,
        # What is said between hosts goes over the default group, and each group over gloo costs three threads.
        create_gloo_process_groups=False,
    )


def ensure_cuda_rng_states() -> None:
    """Give megatron-core's tracker of CUDA generators the states that TransformerEngine's layers ask for.

    Nothing here draws from them (no dropout, initial weights come from the CPU), but a tracker that recompute has
    touched counts as initialised, and without these states no further layer could be built.
    """
    ensure_parallel_state()
    if "model-parallel-rng" not in tensor_parallel.get_cuda_rng_tracker().get_states():
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            tensor_parallel.model_parallel_cuda_manual_seed(0)


def _destroy_own_group(group: object, owner: int) -> None:
    """Destroy the process groups at exit, unless somebody has made others since, or this is a forked child."""
    if os.getpid() == owner and torch.distributed.is_initialized() and torch.distributed.group.WORLD is group:
        torch.distributed.destroy_process_group()
