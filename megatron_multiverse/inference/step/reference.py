"""How one token is drawn, plainly: float64, one row, one line for each thing that can be asked.

`sampler.py` and `shaping.py` do the same for all rows at once; the tests hold them to this, in every combination.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from megatron_multiverse.config.sampling import SamplingParams

Row = npt.NDArray[np.float64]

_BITS = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def edited_logits(
    logits: Row,
    params: SamplingParams,
    *,
    seen: Mapping[int, int],
    banned: Collection[int] = (),
    exempt: Collection[int] = (),
    fitting: Collection[int] | None = None,
) -> Row:
    """Logits [vocab] after bias, penalties and grammar.

    Args:
        logits: [vocab].
        params: what the request asks.
        seen: tokens that the next one sees -> how often they were drawn, 0 for those of the prompt alone.
        banned: ids that may not be drawn now (`min_tokens`).
        exempt: ids that are never penalised.
        fitting: ids that the grammar allows; None: there is none.
    """
    edited = np.array(logits, dtype=np.float64)
    for token, bias in params.logit_bias.items():
        edited[token] += bias
    edited[list(banned)] = -np.inf
    for token, count in seen.items():
        if token in exempt:
            continue
        penalty = params.repetition_penalty
        edited[token] = edited[token] / penalty if edited[token] > 0 else edited[token] * penalty
        edited[token] -= params.frequency_penalty * count
        edited[token] -= params.presence_penalty * (count > 0)
    if fitting is not None:
        edited[[token for token in range(len(edited)) if token not in fitting]] = -np.inf
    return edited


def allowed(scaled: Row, params: SamplingParams) -> npt.NDArray[np.bool_]:
    """Which tokens min-p, then top-k, then top-p leave: bool [vocab]. `scaled`: logits divided by the temperature."""
    keep = np.isfinite(scaled)
    probabilities = _softmax(scaled)
    if params.min_p > 0:
        keep &= scaled >= scaled.max() + np.log(params.min_p)
    if params.top_k > 0:
        ordered = np.sort(scaled[keep])[::-1]
        keep &= scaled >= ordered[min(params.top_k, len(ordered)) - 1]
    if params.top_p < 1:
        probabilities = _softmax(np.where(keep, scaled, -np.inf))
        border, before = np.inf, 0.0
        for token in np.argsort(-probabilities, kind="stable"):
            if before >= params.top_p:
                break
            border, before = scaled[token], before + probabilities[token]
        keep &= scaled >= border
    return keep


def draw(edited: Row, params: SamplingParams, *, key: int, index: int) -> int:
    """The token: greedy at temperature 0, else the largest of the allowed logits with their noise.

    Args:
        edited: what `edited_logits` returns.
        params: what the request asks.
        key: of the branch.
        index: of the token among those its branch has drawn.
    """
    if params.temperature == 0:
        return int(edited.argmax())
    scaled = edited / params.temperature
    noisy = np.where(allowed(scaled, params), scaled + gumbel(key, index, len(edited)), -np.inf)
    return int(noisy.argmax())


def gumbel(key: int, index: int, vocab_size: int) -> Row:
    """Standard Gumbel noise [vocab_size], hashed with splitmix64 from its arguments alone."""
    state = _mix((key & _BITS) ^ _mix(index * _GOLDEN & _BITS))
    words = [_mix(state + entry * _GOLDEN & _BITS) >> 11 for entry in range(1, vocab_size + 1)]
    uniform = (np.array(words, dtype=np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def _mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _BITS
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _BITS
    return x ^ x >> 31


def _softmax(x: Row) -> Row:
    weights = np.exp(x - x.max())
    return weights / weights.sum()
