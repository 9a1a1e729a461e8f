"""What the authors of Multiverse train with: transformers' model under a dense 4-D mask, with gradient checkpointing.

`training_beside_transformers.py` runs it on one GPU, `training_layouts.py` over several by torch's FSDP2
(`fully_shard`), where each rank has rows of its own and a share of the float32 weights, gradients and moments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from megatron_multiverse.checkpoints.formats.hf_config import model_config_to_hf
from megatron_multiverse.checkpoints.fresh import FreshSource
from megatron_multiverse.checkpoints.names.rules import split
from megatron_multiverse.config import LayerConfig, ModelConfig, TrainConfig
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.device import choose_device, to_device
from megatron_multiverse.parallel.ranks import current_ranks
from megatron_multiverse.training.engine import StepResult
from megatron_multiverse.training.flops import peak_tflops
from megatron_multiverse.training.microbatches import Microbatch
from megatron_multiverse.training.optim import build_optimizer, clip_gradients
from megatron_multiverse.training.pipeline import reduced, tokens_of_step

CHUNK = 2048
"""Tokens whose logits are in memory at the same time where the loss goes in chunks."""


def transformers_model(shape: ModelConfig, seed: int, device: torch.device, *, chunked_loss: bool = False) -> nn.Module:
    """transformers' class of a shape with the float32 weights of `FreshSource`, and gradient checkpointing.

    Args:
        shape: of the model.
        seed: of its weights.
        device: where it goes.
        chunked_loss: compute logits and loss for `CHUNK` tokens at a time, as their users do with kernels of others
            where the logits of a long row do not fit. transformers by itself makes the logits of the whole row.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config
    source = FreshSource(shape, seed, device)
    values = model_config_to_hf(shape, source.family, dtype="float32")
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(device):
        model: Any = make(config, attn_implementation="sdpa", dtype=torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for entry in source.entries():
            for (name, _), part in zip(entry.hf, split(entry, source.read(entry), shape), strict=True):
                parameters[name].copy_(part)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if chunked_loss:
        head = model.lm_head
        head.forward = lambda hidden: hidden  # the loss multiplies by its weight
        model.loss_function = lambda logits, **kwargs: loss_in_chunks(head, logits, **kwargs)
    return model.train()  # type: ignore[no-any-return]


def loss_in_chunks(
    head: nn.Linear, hidden: Tensor, *, shift_labels: Tensor, num_items_in_batch: float, **_: Any
) -> Tensor:
    """transformers' loss of hidden states [b, s, h] at labels [b, s], with the logits of one piece at a time."""

    def of_chunk(states: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(states, head.weight).float(), labels, ignore_index=-100, reduction="sum")

    pieces = zip(torch.split(hidden.flatten(0, 1), CHUNK), torch.split(shift_labels.flatten(), CHUNK), strict=True)
    sums = [checkpoint(of_chunk, states, labels, use_reentrant=False) for states, labels in pieces]
    return torch.stack(sums).sum() / num_items_in_batch


def dense_mask(r: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores [b, 1, s, s] for labels r [b, s]: 0 where the key is seen, -inf elsewhere."""
    index = torch.arange(r.shape[1], device=r.device)
    hidden = (index[None] > index[:, None]) | (r[:, None] > r[:, :, None])
    return torch.zeros(hidden.shape, dtype=dtype, device=r.device).masked_fill_(hidden, -torch.inf)[:, None]


def masked_loss(model: Any, batch: Microbatch, device: torch.device, dtype: str, num_items: float) -> Tensor:
    """Loss of a microbatch, summed over its trained tokens and divided by `num_items`."""
    ids, labels, trained, position_ids, r = (
        to_device(batch[name], device) for name in ("input_ids", "labels", "loss_mask", "position_ids", "r")
    )
    labels = labels.masked_fill(trained == 0, -100)
    mask = {"full_attention": dense_mask(r, torch.bfloat16 if dtype == "bf16" else torch.float32)}
    settings = {"labels": labels, "shift_labels": labels, "num_items_in_batch": num_items, "use_cache": False}
    loss: Tensor = model(ids, attention_mask=mask, position_ids=position_ids, **settings).loss
    return loss


class FsdpEngine:
    """Steps of transformers' model over all ranks by FSDP2, with the members of `TrainEngine` that benchmarks use.

    Args:
        config: the run; its ranks are all data parallel.
        shape: of the model.
        chunked_loss: see `transformers_model`.
    """

    def __init__(self, config: TrainConfig, shape: ModelConfig, *, chunked_loss: bool = False) -> None:
        self.config, self.ranks = config, current_ranks()
        self.device = choose_device(config.device)
        self.layers = LayerConfig()
        peak = peak_tflops(self.device, config.dtype)
        self.peak_tflops = None if peak is None else peak * self.ranks.size
        model: Any = transformers_model(shape, config.seed, self.device, chunked_loss=chunked_loss)
        mesh = init_device_mesh(self.device.type, (self.ranks.size,))
        compute = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        self.model = model
        self.optimizer = build_optimizer(model, config.optim)

    def running(self) -> contextlib.AbstractContextManager[None]:
        """See `TrainEngine.running`."""
        return contextlib.nullcontext()

    def step(self, microbatches: Sequence[Microbatch]) -> StepResult:
        """See `TrainEngine.step`."""
        loss_tokens, tokens = tokens_of_step(self.ranks, microbatches)
        own = loss_tokens / self.ranks.size  # FSDP2 takes the mean over ranks of their gradients
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in microbatches:
            loss = masked_loss(self.model, batch, self.device, self.config.dtype, own)
            loss.backward()  # type: ignore[no-untyped-call]
            pairs = LayoutParams.from_labels(to_device(batch["r"], self.device)).num_visible_pairs()
            sums += torch.stack([loss.detach().double() * own, pairs.double()])
        norm = clip_gradients(self.model.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        reduced(sums)
        return StepResult(sums[0], loss_tokens, tokens, sums[1].long(), norm)


RIVALS: dict[str, Callable[[TrainConfig, ModelConfig], FsdpEngine]] = {
    "transformers, dense mask, FSDP2": FsdpEngine,
    "transformers, dense mask, FSDP2, loss in chunks": lambda *args: FsdpEngine(*args, chunked_loss=True),
}
"""Name -> what computes its steps."""
