"""One model call as integers: everything a rank needs to know about a step, and what comes back from it.

A plan is made on one rank, by the scheduler. Every rank can run it, each with its own layers, heads and key/value
store: it holds no object of the scheduler, and `to_bytes` is what travels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class SamplingArrays:
    """How each sampled row draws its token: one entry per row of `StepPlan.sample`."""

    keys: Ints
    """Key of the branch's noise."""
    indices: Ints
    """Index of the token among those its branch has drawn."""
    temperature: Floats
    """0 is greedy."""
    shaping: Shaping | None = None
    """What some rows ask beyond that; None where none does, which is the fast way."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Shaping:
    """What changes the distribution of a token before it is drawn, and what is told about it."""

    top_k: Ints
    """[s]; 0 is off."""
    top_p: Floats
    """[s]; 1 is off."""
    min_p: Floats
    """[s]; 0 is off."""
    num_logprobs: Ints
    """[s], most likely tokens to give beside the drawn one."""
    bias_rows: Ints
    """[b], the row whose logits change; a pair of row and id comes once."""
    bias_ids: Ints
    """[b]."""
    biases: Floats
    """[b], added to that logit; -inf bans the token."""
    penalised: Ints
    """[p], rows with penalties."""
    repetition: Floats
    """[p]; 1 is off."""
    presence: Floats
    """[p]; 0 is off."""
    frequency: Floats
    """[p]; 0 is off."""
    coming: Ints
    """[p], the row of the previous step that draws the token before this one, where the host does not know it yet; else
    -1."""
    seen_rows: Ints
    """[t], index in `penalised`; a pair with an id comes once."""
    seen_ids: Ints
    """[t], tokens that the row sees."""
    seen_counts: Ints
    """[t], how often they were drawn; 0 for those of the prompt alone."""
    exempt: Ints
    """Ids that are never penalised."""
    guided: Ints
    """[g], rows whose next token is held to a grammar."""
    masks: npt.NDArray[np.int32]
    """[g * words], for each of these rows a bit for each id, the lowest first: whether it may be drawn."""

    @property
    def has_filters(self) -> bool:
        """Whether a row leaves tokens out."""
        return bool(((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)).any())

    @property
    def only_filters(self) -> bool:
        """Whether logits are drawn from as they are and nothing is told but the token."""
        return not (len(self.bias_rows) or len(self.penalised) or len(self.guided) or self.num_logprobs.any())


@dataclass(frozen=True, eq=False, kw_only=True)
class StepPlan:
    """A row is one branch with the tokens it brings; the tokens of all rows lie one row after the other."""

    copies: Ints
    """[c, 2], slots to copy before the pass (from, to): forks and joins. All are read before any is written."""
    ids: Ints
    """[n], the tokens."""
    sources: Ints
    """[n], where the host does not know a token yet: which of the previous step's sampled rows drew it; else -1."""
    positions: Ints
    """[n]."""
    borders: Ints
    """[rows + 1], row i brings the tokens [borders[i], borders[i + 1])."""
    pages: npt.NDArray[np.int32]
    """[rows, p], pages of all that each row sees, its new tokens included; shorter lists are padded with the store's
    last page, which nobody owns."""
    lengths: npt.NDArray[np.int32]
    """[rows], tokens that the last token of the row sees, itself included."""
    write_slots: Ints
    """[m >= n], slots that receive new keys and values: page * page_size + offset."""
    write_tokens: Ints
    """[m], the token each slot receives. A token that a fork or a join of this step copies comes several times."""
    sample: Ints
    """[s], rows that want a token after their last one."""
    sampling: SamplingArrays
    """For these rows."""
    scored: Ints
    """[t], tokens of the step whose logits are asked for although the next token is known."""
    targets: Ints
    """[t], these next tokens."""
    num_scores: Ints
    """[t], most likely tokens to give beside each."""
    freed: Ints
    """Pages that came free; a store made for debugging fills them with NaN. Empty otherwise."""
    moved_from: npt.NDArray[np.int32] | None = None
    """`lengths` of the step before, the same array, if this one is what that one's `moved_on` gives. That it is so
    travels, the array does not."""

    def moved_on(self, shaping: Shaping | None = None, freed: Ints | None = None) -> StepPlan:
        """The next step, if each row only goes on by the token that it draws, in the page where its last one is. Every
        row must bring one token, to one slot, and draw. Arrays that stay the same are handed on, so that what has
        uploaded them sees that.

        Args:
            shaping: of that step, where this one has some.
            freed: of that step.
        """
        rows, none = self.sample, self.sample[:0]
        return StepPlan(
            copies=self.copies[:0],
            ids=self.ids if self.sources is rows else np.zeros_like(rows),
            sources=rows,
            positions=self.positions + 1,
            borders=self.borders,
            pages=self.pages,
            lengths=self.lengths + np.int32(1),
            write_slots=self.write_slots + 1,
            write_tokens=rows,
            sample=rows,
            sampling=SamplingArrays(
                keys=self.sampling.keys,
                indices=self.sampling.indices + 1,
                temperature=self.sampling.temperature,
                shaping=shaping,
            ),
            scored=none,
            targets=none,
            num_scores=none,
            freed=none if freed is None else freed,
            moved_from=self.lengths,
        )

    def to_bytes(self) -> bytes:
        """All arrays, one after the other, after a header of their sizes."""
        arrays, moved = self._arrays(), self.moved_from is not None
        sizes = [array.size for array in arrays]
        header = np.array([len(arrays), moved, self.pages.shape[1], *sizes], dtype=np.int64)
        return b"".join((header.tobytes(), *(array.tobytes() for array in arrays)))

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, before: StepPlan | None = None) -> StepPlan:
        """What `to_bytes` wrote; the arrays are views of `data`.

        Args:
            data: the bytes.
            before: the plan of the step before, which `moved_from` may name; None leaves that out.
        """
        count = int(np.frombuffer(data, dtype=np.int64, count=1)[0])
        moved, width, *sizes = np.frombuffer(data, dtype=np.int64, count=2 + count, offset=8).tolist()
        position = 8 * (3 + count)
        arrays: dict[str, npt.NDArray[np.generic]] = {}
        for name, size in zip(_DTYPES, sizes, strict=False):  # the arrays of `Shaping` come last, or not at all
            dtype = np.dtype(_DTYPES[name])
            arrays[name] = np.frombuffer(data, dtype=dtype, count=size, offset=position)
            position += size * dtype.itemsize
        arrays["pages"] = arrays["pages"].reshape(-1, width)
        arrays["copies"] = arrays["copies"].reshape(-1, 2)

        def take(names: list[str]) -> dict[str, Any]:
            return {name: arrays.pop(name) for name in names}

        plain = take(_PLAN_FIELDS)
        sampling = take(_SAMPLING_FIELDS)
        shaping = Shaping(**take(_SHAPING_FIELDS)) if arrays else None
        moved_from = before.lengths if moved and before is not None else None
        return cls(**plain, sampling=SamplingArrays(**sampling, shaping=shaping), moved_from=moved_from)

    def _arrays(self) -> list[npt.NDArray[np.generic]]:
        plain = [getattr(self, name) for name in _PLAN_FIELDS]
        plain += [getattr(self.sampling, name) for name in _SAMPLING_FIELDS]
        shaping = self.sampling.shaping
        return plain if shaping is None else plain + [getattr(shaping, name) for name in _SHAPING_FIELDS]


_OF_ANNOTATION = {"Ints": np.int64, "Floats": np.float64, "npt.NDArray[np.int32]": np.int32}
_DTYPES = {
    field.name: _OF_ANNOTATION[str(field.type)]
    for part in (StepPlan, SamplingArrays, Shaping)
    for field in fields(part)
    if str(field.type) in _OF_ANNOTATION
}
"""Types of the arrays, as they are annotated, in the order in which they travel."""
_PLAN_FIELDS, _SAMPLING_FIELDS, _SHAPING_FIELDS = (
    [field.name for field in fields(part) if field.name in _DTYPES] for part in (StepPlan, SamplingArrays, Shaping)
)


class StepOutput(NamedTuple):
    """What a step gives back, one entry per sampled row, in the order of `StepPlan.sample`."""

    tokens: Ints
    logprobs: Floats
    """Log-probability of each token under the model's own distribution."""
    finite: npt.NDArray[np.bool_]
    """Whether that is a number: false where the model's logits are broken."""
    top_ids: Ints
    """[s, n], the most likely tokens, for the row that asks for most of them; n is 0 where none does."""
    top_logprobs: Floats
    """[s, n], theirs."""
    scores: Floats
    """[t], log-probabilities of `StepPlan.targets`."""
    score_top_ids: Ints
    """[t, m], the most likely tokens in their places."""
    score_top_logprobs: Floats
    """[t, m], theirs."""

    def top(self, row: int, count: int) -> list[tuple[int, float]] | None:
        """(id, log-probability) of the `count` most likely tokens of a sampled row; None for 0."""
        return _pairs(self.top_ids[row, :count], self.top_logprobs[row, :count]) if count else None

    def score_top(self, index: int, count: int) -> list[tuple[int, float]] | None:
        """The same in the place of a target."""
        return _pairs(self.score_top_ids[index, :count], self.score_top_logprobs[index, :count]) if count else None


def _pairs(ids: Ints, logprobs: Floats) -> list[tuple[int, float]] | None:
    return list(zip(ids.tolist(), logprobs.tolist(), strict=True)) or None
