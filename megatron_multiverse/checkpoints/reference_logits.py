"""Logits of a checkpoint on fixed ids, by transformers' own model and by ours over tensor and pipeline ranks.

Both models run twice: under plain causal attention, and under the Multiverse mask of a sample with nested blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.load import model_from_source
from megatron_multiverse.checkpoints.protocols import Source
from megatron_multiverse.model.attention import AttentionParams, LayoutParams
from megatron_multiverse.model.mcore import set_parallel_sizes
from megatron_multiverse.model.transformers_attention import register_attention
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
def transformers_logits(folder: str | Path, inputs: Inputs) -> Logits:
    """float32 logits [2, s, rows] by transformers' own model, loaded from a Hugging Face folder."""
    from transformers import AutoModelForCausalLM

    register_attention()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    causal = model(inputs.input_ids, use_cache=False).logits
    model.set_attn_implementation("multiverse")
    structured = model(inputs.input_ids, position_ids=inputs.position_ids, r=inputs.r, use_cache=False).logits
    return {"causal": causal, "multiverse": structured}


@torch.no_grad()
def rank_logits(open_source: Callable[[], Source], tp: int, pp: int, inputs: Inputs) -> Logits:
    """Logits by our model over the ranks of this process group; all ranks call this.

    Args:
        open_source: opens the checkpoint.
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        inputs: the batch.

    Returns:
        Logits [2, s, vocab] on the ranks of the last stage, nothing on the others.
    """
    set_parallel_sizes(tp, pp)
    model = model_from_source(open_source())[0].eval()
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
