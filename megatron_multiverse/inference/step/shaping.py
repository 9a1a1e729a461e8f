"""What changes a distribution before a token is drawn, biases, penalties and grammars, and what is told about it.

All rows of a step at once, on the device, in float64; `reference.py` is the same for one row in plain numpy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_multiverse.inference.step.plan import Shaping


def edit_logits(logits: Tensor, shaping: Shaping, last_tokens: Tensor) -> Tensor:
    """The logits with biases added and penalties taken, and without what grammars forbid, before any temperature.

    Args:
        logits: [rows, vocab], stays as it is.
        shaping: what each row asks.
        last_tokens: tokens that the previous step drew, for `Shaping.coming`.

    Returns:
        float64 [rows, vocab]; `logits` itself where nothing changes.
    """
    if not (len(shaping.bias_rows) or len(shaping.penalised) or len(shaping.guided)):
        return logits
    edited = logits.double()
    if edited is logits:
        edited = logits.clone()

    def there(array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(logits.device)

    edited[there(shaping.bias_rows), there(shaping.bias_ids)] += there(shaping.biases)
    if len(shaping.penalised):
        rows = there(shaping.penalised)
        edited[rows] = _penalise(edited[rows], _counts(logits.shape[-1], shaping, last_tokens), shaping)
    if len(shaping.guided):
        rows = there(shaping.guided)
        edited[rows] = edited[rows].masked_fill(~_bits(there(shaping.masks), len(rows), logits.shape[-1]), -np.inf)
    return edited


def _bits(masks: Tensor, rows: int, vocab: int) -> Tensor:
    """bool [rows, vocab]: the bits of `Shaping.masks`; ids that they do not reach are not allowed."""
    bits = masks.view(rows, -1, 1) >> torch.arange(32, dtype=torch.int32, device=masks.device) & 1
    found = bits.flatten(1)[:, :vocab].bool()
    return torch.nn.functional.pad(found, (0, vocab - found.shape[1]))


def _counts(vocab: int, shaping: Shaping, last_tokens: Tensor) -> Tensor:
    """float64 [penalised rows, vocab]: how often the row sees each token drawn, 0 for the prompt's, -1 for others."""
    device = last_tokens.device
    counts = torch.full((len(shaping.penalised), vocab), -1.0, dtype=torch.float64, device=device)
    seen = torch.from_numpy(np.stack((shaping.seen_rows, shaping.seen_ids))).to(device)
    counts[seen[0], seen[1]] = torch.from_numpy(shaping.seen_counts).to(device).double()
    rows = np.flatnonzero(shaping.coming >= 0)
    if len(rows):
        tokens = last_tokens[torch.from_numpy(shaping.coming[rows]).to(device)]
        index = torch.from_numpy(rows).to(device)
        counts[index, tokens] = counts[index, tokens].clamp(min=0) + 1
    counts[:, torch.from_numpy(shaping.exempt).to(device)] = -1
    return counts


def _penalise(logits: Tensor, counts: Tensor, shaping: Shaping) -> Tensor:
    repetition, presence, frequency = (
        torch.from_numpy(array).to(logits.device)[:, None]
        for array in (shaping.repetition, shaping.presence, shaping.frequency)
    )
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(counts >= 0, repeated, logits)
    drawn = counts.clamp(min=0)
    return logits - frequency * drawn - presence * (drawn > 0)


def top_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens under the model's own distribution (temperature 1, nothing changed).

    Args:
        logits: [rows, vocab].
        count: how many.

    Returns:
        Ids int64 [rows, count] and log-probabilities [rows, count], float32 or wider, the most likely first. Where the
        vocabulary is smaller, the last one repeats.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    best = wide.topk(min(count, wide.shape[-1]), dim=-1)
    missing = count - best.values.shape[-1]
    values, ids = (torch.cat((x, x[:, -1:].expand(-1, missing)), 1) for x in (best.values, best.indices))
    return ids, values
