"""The policy loss again, plainly: answer by answer, token by token, in float64. Tests hold `loss.py` to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.inference import Result
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.structure import StructureVocab, lay_out, parse


def policy_loss_reference(
    model: Any,
    results: Sequence[Result],
    advantages: Sequence[float],
    vocab: StructureVocab,
    vocab_size: int,
    *,
    clip_low: float,
    clip_high: float,
    reference: Any = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """Mean loss over all tokens that the model drew, of answers that are computed each by itself.

    Args:
        model: in float64, on the CPU.
        results: answers, to any prompts.
        advantages: of each.
        vocab: of the tokenizer.
        vocab_size: ids that can be drawn.
        clip_low: ratios count down to 1 - clip_low.
        clip_high: and up to 1 + clip_high.
        reference: another model, which gets no gradient.
        kl_coef: weight of the divergence from it.

    Returns:
        A scalar with a gradient.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for result, advantage in zip(results, advantages, strict=True):
        ids = [*result.prompt_ids, *result.token_ids]
        layout = lay_out(parse(ids, vocab, prompt_length=len(result.prompt_ids), strict=False))
        params = LayoutParams.from_labels(torch.from_numpy(layout.r)[None], backend="dense")
        positions = torch.from_numpy(layout.position_ids)[None].long()
        logits = model(torch.tensor([ids]), positions, None, packed_seq_params=params)[0, :, :vocab_size]
        theirs = None
        if reference is not None:
            theirs = reference(torch.tensor([ids]), positions, None, packed_seq_params=params)[0, :, :vocab_size]
        for context, token, old in _drawn(result):
            new = logits[context].log_softmax(-1)[token]
            ratio = (new - old).exp()
            if advantage >= 0:  # a bonus stops to count once the token is likely enough
                gain = advantage * ratio if ratio < 1 + clip_high else advantage * (1 + clip_high)
            else:
                gain = advantage * ratio if ratio > 1 - clip_low else advantage * (1 - clip_low)
            total, count = total - gain, count + 1
            if theirs is not None:
                apart = theirs[context].log_softmax(-1)[token].detach() - new
                total = total + kl_coef * (apart.exp() - 1 - apart)
    return total / max(1, count)


def _drawn(result: Result) -> list[tuple[int, int, float]]:
    """(index of the token before, token, log-probability) of everything that the model drew."""
    prompt = len(result.prompt_ids)
    texts = zip(result.parents, result.token_ids, result.logprobs, strict=True)
    drawn = [(prompt + parent, token, logprob) for parent, token, logprob in texts if logprob is not None]
    return drawn + [(prompt + end.parent, end.token, end.logprob) for end in result.ends]
