"""The loss of a training step without the logits of all its tokens: they stand in memory for a chunk at a time.

The logits are the largest tensor of a step: 32,768 tokens over 152,064 entries take 9.3 GiB in bf16, and their softmax
twice as much in float32. What a step differentiates is a sum over tokens, so a chunk's gradients are known as soon as
its logits are, and the backward pass has only to scale them. Nothing is computed twice. (The idea is that of Liger
Kernel's fused linear cross entropy, arXiv 2410.10989, which does not know tensor parallel ranks; the cross entropy of a
chunk is megatron-core's or TransformerEngine's, which do.)

Shapes: s tokens of each of b rows, h width of the residual stream, v entries of the vocabulary on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

CrossEntropy = Callable[[Tensor, Tensor], Tensor]
"""(labels [b, c], logits [c, b, v], which it may overwrite) -> loss of each token [b, c]."""


class LossTokens(NamedTuple):
    """What is predicted, and how its loss is computed."""

    labels: Tensor
    """int64 [b, s]."""
    loss_mask: Tensor
    """Weight of each token's loss [b, s]."""
    cross_entropy: CrossEntropy
    """Of one chunk."""
    first_padded_row: int | None
    """See `ChunkedLossGPT`."""


class ChunkedLossGPT(GPTModel):  # type: ignore[misc]
    """megatron-core's model, which is also called with a `loss_mask` [b, s] beside the labels: it then returns the loss
    summed over the tokens of the mask, a scalar, and in training computes it in chunks."""

    chunk_tokens: int = 0
    """Tokens of a chunk; 0 computes the logits of all tokens at once."""
    first_padded_row: int | None = None
    """Row of this rank's part of the vocabulary from which on there is padding, whose logits are -inf; None without."""

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, labels: Tensor | None, loss_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """megatron-core's last step: from hidden states [s, b, h] to what the model returns."""
        if not self.post_process or loss_mask is None:
            out: Tensor = super()._postprocess(hidden_states, *args, labels=labels, loss_mask=loss_mask, **kwargs)
            return out
        assert labels is not None, "a loss mask goes with labels"
        if self.chunk_tokens and torch.is_grad_enabled():
            return self._chunked_loss(hidden_states, labels, loss_mask, self.chunk_tokens)
        per_token: Tensor = super()._postprocess(hidden_states, *args, labels=labels, loss_mask=None, **kwargs)
        return (per_token * loss_mask).sum()

    def _chunked_loss(self, hidden: Tensor, labels: Tensor, loss_mask: Tensor, chunk_tokens: int) -> Tensor:
        layer, group = self.output_layer, self.pg_collection.tp
        # What megatron-core's output layer does before its product: the backward pass adds up the ranks' gradients.
        if layer.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else layer.weight
        tokens = LossTokens(labels, loss_mask, self.compute_language_model_loss, self.first_padded_row)
        return summed_loss(hidden, weight, tokens, chunk_tokens)


def summed_loss(hidden: Tensor, weight: Tensor, tokens: LossTokens, chunk_tokens: int) -> Tensor:
    """Loss summed over the tokens of the mask; differentiable in `hidden` and `weight`.

    Args:
        hidden: [s, b, h].
        weight: of the output layer [v, h].
        tokens: their labels, and how their loss is computed.
        chunk_tokens: tokens of a chunk.

    Returns:
        float32 scalar.
    """
    loss: Tensor = _SummedLoss.apply(hidden, weight, tokens, chunk_tokens)  # type: ignore[no-untyped-call]
    return loss


class _SummedLoss(torch.autograd.Function):
    """See `summed_loss`. Both gradients are taken on the way forward, for an upstream gradient of 1."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: LossTokens, chunk_tokens: int) -> Tensor:
        labels, loss_mask, cross_entropy, first_padded_row = tokens
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        matrix, total = weight.to(dtype), torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        # Chunks are added up in float32: in bf16 each addition would round.
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
        rows = max(1, chunk_tokens // hidden.shape[1])
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), rows):
                own = slice(start, start + rows)
                inputs = hidden[own].to(dtype)
                logits = F.linear(inputs, matrix)
                if first_padded_row is not None:
                    logits[..., first_padded_row:] = -torch.inf
                with torch.enable_grad():
                    loss = (cross_entropy(labels[:, own], logits.requires_grad_()) * loss_mask[:, own]).sum()
                (grad_logits,) = torch.autograd.grad(loss, logits)
                total += loss.detach()
                grad_hidden[own] = grad_logits @ matrix
                grad_weight += grad_logits.flatten(0, 1).t() @ inputs.flatten(0, 1)
                del logits, loss, grad_logits  # or they would lie beside the logits of the next chunk
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states and weight."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * upstream[0], grad_weight * upstream[0], None, None
