"""The cross entropy of TransformerEngine's layers, in chunks and at once, beside torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_multiverse.config import LayerConfig
from megatron_multiverse.model.chunked_loss import LossTokens, summed_loss
from megatron_multiverse.model.families import qwen2
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.layer_specs import transformer_engine_problem

PROBLEM = transformer_engine_problem(torch.device("cuda")) if torch.cuda.is_available() else "needs CUDA"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))]

SHAPE = qwen2(
    num_layers=1, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, num_query_groups=2, kv_channels=64,
    vocab_size=40_000, max_sequence_length=512,
)  # fmt: skip
PADDED = 39_900
"""The first row of the vocabulary that is padding."""


@pytest.mark.parametrize("chunk", [64, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_and_gradients(dtype: torch.dtype, chunk: int) -> None:
    """300 tokens of each of 2 rows, with weights that are no 0 or 1."""
    layers = LayerConfig(transformer_impl="transformer_engine")
    model = build_gpt_model(SHAPE, dtype=dtype, device="cuda", layers=layers)
    assert model.config.cross_entropy_loss_fusion
    generator = torch.Generator("cuda").manual_seed(chunk)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, device="cuda") / 4
        return x.to(dtype).requires_grad_()

    hidden, weight = draw(300, 2, 256), draw(40_000, 256)
    labels = torch.randint(PADDED, (2, 300), generator=generator, device="cuda")
    loss_mask = torch.rand(2, 300, generator=generator, device="cuda")

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss * 0.3, (hidden, weight))

    logits = F.linear(hidden.double(), weight.double())
    logits[..., PADDED:] = -torch.inf
    plain = F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")
    want = gradients((plain * loss_mask).sum())
    tokens = LossTokens(labels, loss_mask, model.compute_language_model_loss, PADDED)
    got = gradients(summed_loss(hidden, weight, tokens, chunk))
    assert not got[2][PADDED:].any(), "padding of the vocabulary has no gradient"
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3  # float32 products are TF32 where torch is told so
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == (torch.float32 if ours.dim() == 0 else dtype)
        assert float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < tolerance
