"""Logits of a checkpoint on fixed ids, by transformers' own model and by ours over tensor and pipeline ranks.

Both models run twice: under plain causal attention, and under the Multiverse mask of a sample with nested blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.load import model_from_source
from megatron_multiverse.checkpoints.protocols import Source
from megatron_multiverse.checkpoints.sources import open_checkpoint
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.model.attention import AttentionParams, LayoutParams
from megatron_multiverse.model.mcore import pipeline_parallel_size, set_parallel_sizes, tensor_parallel_place
from megatron_multiverse.model.transformers_attention import register_attention
from megatron_multiverse.parallel.local_ranks import run_ranks
from megatron_multiverse.structure import BlockSpan, Document, PathSpan
from megatron_multiverse.structure.layout import lay_out, pack_layouts

Mask = Literal["causal", "multiverse"]
MASKS: tuple[Mask, ...] = ("causal", "multiverse")
Logits = dict[Mask, Tensor]


@dataclass(frozen=True)
class Inputs:
    """One batch of a sample with nested blocks, and one of packed samples; int64 [2, s]."""

    input_ids: Tensor
    position_ids: Tensor
    r: Tensor


def fixed_inputs(ids: Sequence[int], *, seed: int = 0) -> Inputs:
    """The same random tokens out of `ids` on every machine, laid out as Multiverse samples.

    Where the blocks stand is fixed here, not read from tags, so a vocabulary without tags can be tested too.
    """
    inner = BlockSpan(12, goal_end=15, paths=[PathSpan(15, 18, 15), PathSpan(18, 23, 18)], forced_end=24, end=26)
    paths = [PathSpan(8, 28, 9, blocks=[inner]), PathSpan(28, 33, 29), PathSpan(33, 42, 34)]
    outer = BlockSpan(3, goal_end=8, paths=paths, forced_end=43, end=45)
    nested = lay_out(Document(48, prompt_length=2, blocks=[outer]))
    flat = lay_out(Document(20, blocks=[BlockSpan(1, 4, [PathSpan(4, 9, 5), PathSpan(9, 14, 10)], 15, 17)]))
    rows = [nested, pack_layouts([flat, lay_out(Document(28))])]
    choice = torch.randint(0, len(ids), (2, 48), generator=torch.Generator().manual_seed(seed))
    return Inputs(
        input_ids=torch.tensor(list(ids))[choice],
        position_ids=torch.stack([torch.from_numpy(row.position_ids).long() for row in rows]),
        r=torch.stack([torch.from_numpy(row.r).long() for row in rows]),
    )


@torch.no_grad()
def transformers_logits(
    folder: str | Path, inputs: Inputs, rounded_to: torch.dtype | None = None
) -> tuple[Logits, float]:
    """Logits by transformers' own model, loaded in float32 from a Hugging Face folder.

    Args:
        folder: the folder.
        inputs: the batch.
        rounded_to: round the weights to this dtype first.

    Returns:
        The logits [2, s, rows], and the noise of the model: the relative error between two ways in which transformers
        computes the causal ones (its sdpa and its eager attention), which differ in rounding alone.

    Raises:
        CheckpointError: transformers refuses the folder.
    """
    import transformers

    register_attention()
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
    except Exception as error:  # whatever the many checks of the library raise
        raise CheckpointError(f"transformers {transformers.__version__} cannot open {folder}: {error}") from error
    if rounded_to is not None:
        for weight in model.parameters():  # not model.to: it would round the rotary frequencies too
            weight.copy_(weight.to(rounded_to))
    causal = model(inputs.input_ids, use_cache=False).logits
    model.set_attn_implementation("eager")
    noise = relative_error(causal, model(inputs.input_ids, use_cache=False).logits)
    model.set_attn_implementation("multiverse")
    structured = model(inputs.input_ids, position_ids=inputs.position_ids, r=inputs.r, use_cache=False).logits
    return {"causal": causal, "multiverse": structured}, noise


def relative_error(want: Tensor, got: Tensor) -> float:
    """Largest absolute difference over the largest absolute value; infinite if anything is not finite."""
    error = float((want - got).abs().max() / want.abs().max())
    return error if torch.isfinite(torch.tensor(error)) else float("inf")


@torch.no_grad()
def rank_logits(
    open_source: Callable[[], Source], tp: int, pp: int, inputs: Inputs, dtype: torch.dtype = torch.float32
) -> Logits:
    """Logits by our model over the ranks of this process group; all ranks call this.

    Args:
        open_source: opens the checkpoint.
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        inputs: the batch.
        dtype: of the weights.

    Returns:
        Logits [2, s, vocab] on the ranks of the last stage, nothing on the others.
    """
    if (tensor_parallel_place()[0], pipeline_parallel_size()) != (tp, pp):
        set_parallel_sizes(tp, pp)
    model = model_from_source(open_source(), dtype=dtype)[0].eval()
    order = torch.arange(inputs.input_ids.shape[1]).expand_as(inputs.input_ids)
    passes: dict[Mask, tuple[Tensor, LayoutParams]] = {
        "causal": (order, LayoutParams.causal(inputs.input_ids)),
        "multiverse": (inputs.position_ids, LayoutParams.from_labels(inputs.r)),
    }
    found = {
        mask: pipeline_logits(model, inputs.input_ids, positions, params)
        for mask, (positions, params) in passes.items()
    }
    return {mask: logits for mask, logits in found.items() if logits is not None}


@dataclass(frozen=True)
class Job:
    """Logits of one checkpoint at one pair of parallel sizes."""

    folder: Path
    tp: int
    pp: int
    inputs: Inputs
    trust_pickle: bool = False
    dtype: torch.dtype = torch.float32


def own_logits(folder: Path, inputs: Inputs, trust_pickle: bool) -> tuple[Logits, float]:
    """Logits by our model on one rank in float32, and their noise: how far they are from those in float64."""
    jobs = [Job(folder, 1, 1, inputs, trust_pickle, dtype) for dtype in (torch.float32, torch.float64)]
    found, exact = parallel_logits(jobs)
    return found, relative_error(exact["causal"], found["causal"].double())


def parallel_logits(jobs: Sequence[Job]) -> list[Logits]:
    """Logits of every job, in the order of jobs; jobs with the same number of ranks share their processes."""
    results: dict[int, Logits] = {}
    for world_size in sorted({job.tp * job.pp for job in jobs}):
        chosen = {k: job for k, job in enumerate(jobs) if job.tp * job.pp == world_size}
        last_rank = run_ranks(_run_jobs, world_size, list(chosen.values()))[-1]
        results |= dict(zip(chosen, last_rank, strict=True))
    return [results[k] for k in range(len(jobs))]


def _run_jobs(jobs: Sequence[Job]) -> list[Logits]:
    """On each rank; the last one is on the last stage and has all logits."""
    found: dict[int, Logits] = {}
    # Jobs that divide the ranks alike follow each other: every division starts dozens of threads that stay.
    for k in sorted(range(len(jobs)), key=lambda k: jobs[k].tp):
        job = jobs[k]
        opener = functools.partial(open_checkpoint, job.folder, trust_pickle=job.trust_pickle)
        found[k] = rank_logits(opener, job.tp, job.pp, job.inputs, job.dtype)
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    return [found[k] for k in range(len(jobs))] if last else []


@torch.no_grad()
def pipeline_logits(model: Any, input_ids: Tensor, position_ids: Tensor, params: AttentionParams) -> Tensor | None:
    """A forward pass of a model that is spread over tensor and pipeline ranks.

    Args:
        model: this rank's part (model.gpt.build_gpt_model).
        input_ids: [b, s].
        position_ids: [b, s].
        params: what this pass attends to.

    Returns:
        All logits [b, s, vocab] on the last pipeline stage, None on the others.
    """
    from megatron.core import parallel_state

    if not parallel_state.is_pipeline_first_stage():
        weight = next(model.parameters())
        hidden = torch.empty(input_ids.shape[1], input_ids.shape[0], model.config.hidden_size, dtype=weight.dtype)
        torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    out: Tensor = model(input_ids, position_ids, None, packed_seq_params=params)
    if not parallel_state.is_pipeline_last_stage():
        torch.distributed.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    # Not megatron-core's gather: it allocates on the GPU whenever there is one.
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(out) for _ in range(group.size())]
    torch.distributed.all_gather(parts, out.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
