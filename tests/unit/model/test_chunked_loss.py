"""The loss in chunks and its gradients are those of all logits at once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_multiverse.config import LayerConfig
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.chunked_loss import LossTokens, summed_loss
from megatron_multiverse.model.families import qwen2
from megatron_multiverse.model.gpt import build_gpt_model, hide_padded_rows

SHAPE = qwen2(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=50,
    max_sequence_length=64,
)  # fmt: skip


def cross_entropy(labels: Tensor, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.permute(1, 2, 0).float(), labels, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 5, 7, 22, 100])
def test_loss_and_gradients(dtype: torch.dtype, chunk: int) -> None:
    """11 tokens of each of 2 rows; chunks that divide them and chunks that do not, with weights that are no 0 or 1."""
    generator = torch.Generator().manual_seed(chunk)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    hidden, weight = draw(11, 2, 8), draw(13, 8)
    labels, loss_mask = torch.randint(10, (2, 11), generator=generator), torch.rand(2, 11, generator=generator)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss * 0.3, (hidden, weight))

    logits = F.linear(hidden, weight)
    logits = torch.cat([logits[..., :10], torch.full_like(logits[..., 10:], -torch.inf)], dim=-1)
    want = gradients((cross_entropy(labels, logits) * loss_mask).sum())
    got = gradients(summed_loss(hidden, weight, LossTokens(labels, loss_mask, cross_entropy, 10), chunk))
    assert not got[2][10:].any(), "padding of the vocabulary has no gradient"
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2}[dtype]  # the cross entropy is float32
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_chunk_leaves_before_the_next_comes() -> None:
    """Neither its logits nor their gradient lie beside the logits of the next chunk."""
    earlier: list[StorageWeakRef] = []

    def watched(labels: Tensor, logits: Tensor) -> Tensor:
        assert all(storage.expired() for storage in earlier), "a chunk is kept"
        earlier.append(StorageWeakRef(logits.untyped_storage()))
        logits.register_hook(lambda gradient: earlier.append(StorageWeakRef(gradient.untyped_storage())))
        return cross_entropy(labels, logits)

    hidden, weight = torch.randn(12, 1, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    tokens = LossTokens(torch.zeros(1, 12, dtype=torch.int64), torch.ones(1, 12), watched, None)
    summed_loss(hidden, weight, tokens, 4).backward()
    assert len(earlier) == 6


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_with_chunks_trains_as_one_without(tied: bool, autocast: bool) -> None:
    shape = dataclasses.replace(SHAPE, share_embeddings_and_output_weights=tied)
    ids = torch.randint(0, 40, (2, 24), generator=torch.Generator().manual_seed(0))
    labels, loss_mask = ids.roll(-1, 1), (torch.arange(24) % 3 > 0).float().expand(2, -1)
    found = {}
    for chunk in (0, 9):
        model = build_gpt_model(shape, layers=LayerConfig(loss_chunk_tokens=chunk))
        hide_padded_rows(model, 40)
        inputs = ids, torch.arange(24).expand(2, -1), None
        options = {"labels": labels, "loss_mask": loss_mask, "packed_seq_params": LayoutParams.causal(ids)}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(*inputs, **options)
            with torch.no_grad():
                validation = model(*inputs, **options)
            (loss / 7).backward()  # megatron-core's linear layers restore autocast on CUDA alone
        torch.testing.assert_close(loss, validation, rtol=1e-2 if autocast else 1e-6, atol=0)
        found[chunk] = [loss.detach(), *(p.grad for p in model.parameters())]
    for name, ours, theirs in zip(("loss", *dict(model.named_parameters())), found[9], found[0], strict=True):
        scale = float(theirs.abs().max())
        assert torch.allclose(ours, theirs, rtol=0, atol=scale * (2e-2 if autocast else 1e-5)), name
