"""What a validation finds: the loss, and how often the model would write the very tag that stands in the data, with
which forking and joining by itself begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed


@dataclass(frozen=True)
class Validation:
    """What a validation found, over the microbatches of all ranks."""

    loss: float
    """Mean over the trained tokens; NaN without any."""
    loss_tokens: int
    """Trained tokens."""
    tags: int = 0
    """Those that are structure tags; 0 where structure is not written in the tokens."""
    correct_tags: int = 0
    """Those of them that the model would write itself there, as its likeliest token after the text before them."""

    @classmethod
    def of_sums(cls, sums: Tensor, loss_tokens: int) -> Validation:
        """From [loss, tags, correct tags] summed over all ranks; waits for the device."""
        loss, tags, correct = sums.tolist()
        return cls(loss / loss_tokens if loss_tokens else math.nan, loss_tokens, int(tags), int(correct))

    @property
    def tag_accuracy(self) -> float | None:
        """Share of correct tags; None without any."""
        return self.correct_tags / self.tags if self.tags else None


class TagCounter:
    """Counts, over validation passes, the trained tags and those for which the model's likeliest token is that tag.

    A pass with labels gives losses alone, so inside the block the logits are looked at where they come out, in the
    output layer. A tensor parallel rank has those of its part of the vocabulary; all of them get the same counts.

    Args:
        models: this rank's part of the model: one, or several with an interleaved pipeline.
        tag_ids: ids of the tags; None where structure is not written in the tokens: nothing is counted.
    """

    def __init__(self, models: Iterable[Any], tag_ids: Sequence[int] | None) -> None:
        self._models, self._tag_ids = list(models), tag_ids
        self._likeliest: Tensor | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> TagCounter:
        if self._tag_ids is not None:
            layers = [getattr(model, "output_layer", None) for model in self._models]
            self._hooks = [layer.register_forward_hook(self._look) for layer in layers if layer is not None]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _look(self, module: Any, args: object, output: tuple[Tensor, object]) -> None:
        """Keep the likeliest tokens of a pass, int64 [b, s]; its logits are [s, b, vocabulary of this rank]."""
        values, ids = output[0].max(dim=-1)
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        if ranks > 1:
            ids += parallel_state.get_tensor_model_parallel_rank() * output[0].shape[-1]
            values, ids = _gathered(values, ranks), _gathered(ids, ranks)
            ids = ids.gather(0, values.argmax(0, keepdim=True))[0]
        self._likeliest = ids.T

    def count(self, labels: Tensor, loss_mask: Tensor) -> Tensor:
        """Of the pass just made: (tags, those that the model would write), float64 [2]; 0 where no logits come out.

        Args:
            labels: int [b, s], those of the tokens that the pass was about.
            loss_mask: [b, s], 1 where the label is trained.
        """
        likeliest, self._likeliest = self._likeliest, None
        if likeliest is None or self._tag_ids is None:
            return torch.zeros(2, dtype=torch.float64, device=labels.device)
        is_tag = torch.isin(labels, torch.tensor(self._tag_ids, device=labels.device)) & (loss_mask > 0)
        return torch.stack([is_tag.sum(), (is_tag & (likeliest == labels)).sum()]).double()


def _gathered(x: Tensor, ranks: int) -> Tensor:
    """The tensors of all tensor parallel ranks, in a new first dimension."""
    whole = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
    group = parallel_state.get_tensor_model_parallel_group()
    distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole.view(ranks, *x.shape)
