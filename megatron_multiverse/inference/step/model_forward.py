"""A model's own forward pass over the paged cache, for models that `PagedForward` cannot stand in for.

All tokens of a step lie in one sequence [1, n], so megatron-core's layers run unchanged; only their core attention asks
`PagedParams`, which writes the new keys and values into their slots and then lets every row attend over its pages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from megatron_multiverse.inference.step.forward import KVStore, StepTensors
from megatron_multiverse.inference.step.model_ranks import ModelRanks
from megatron_multiverse.model.attention import AttentionParams


@dataclass
class PagedParams(AttentionParams):
    """Attention over the store for one step."""

    store: KVStore = field(kw_only=True, repr=False)
    tensors: StepTensors = field(kw_only=True, repr=False)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, softmax_scale: float) -> Tensor:
        """See AttentionParams.attend; s is the number of tokens of the step, b is 1."""
        store, step = self.store, self.tensors
        layer = layer_number - store.first_layer
        for cached, new in zip(store.flat[layer], (key[:, 0], value[:, 0]), strict=True):
            written = new if step.write_tokens is None else new.index_select(0, step.write_tokens)
            cached.index_copy_(0, step.write_slots, written)
        out = step.attention(query[:, 0], store.keys[layer], store.values[layer], softmax_scale)
        return out.flatten(1)[:, None]


class ModelForward:
    """Calls a model as it is, with the interface of `PagedForward`.

    Args:
        model: see `Runner`.
        ranks: those that hold the model between them.
    """

    def __init__(self, model: nn.Module, ranks: ModelRanks) -> None:
        self.model: Any = model
        self.ranks = ranks
        self._logit_tokens: Tensor | None = None
        self._selected = False
        output_layer = getattr(model, "output_layer", None)
        self._hook = (
            output_layer.register_forward_pre_hook(self._select_hidden) if isinstance(output_layer, nn.Module) else None
        )

    def close(self) -> None:
        """Take the hook off the model."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __call__(self, step: StepTensors, store: KVStore) -> Tensor | None:
        """See PagedForward."""
        model, ranks = self.model, self.ranks
        self._logit_tokens, self._selected = step.logit_tokens, False
        params = PagedParams(store=store, tensors=step)
        if not ranks.is_first_stage:
            like = next(model.parameters())
            model.set_input_tensor(ranks.receive_hidden(len(step.ids), like, model.config.hidden_size)[:, None])
        try:
            out: Tensor = model(step.ids[None], step.positions[None], None, packed_seq_params=params)
        finally:
            self._logit_tokens = None
        if not ranks.is_last_stage:
            ranks.send_hidden(out[:, 0])
            return None
        logits = out[0] if self._selected else out[0].index_select(0, step.logit_tokens)
        return ranks.join_vocab(logits)

    def _select_hidden(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keep only the tokens whose logits are asked for: the vocabulary is wide, most tokens need none."""
        if self._logit_tokens is None:
            return None
        self._selected = True
        return (args[0].index_select(0, self._logit_tokens), *args[1:])
