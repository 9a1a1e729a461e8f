"""Runs the model on one step. The seam for CUDA graphs, tensor and pipeline parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_multiverse.inference.context import PagedParams, Row, StepBatch, build_batch
from megatron_multiverse.inference.pages import PagePool


class Runner:
    """A model and its page pool.

    Args:
        model: called as ``model(input_ids, position_ids, None, packed_seq_params=params)`` -> logits [1, n, vocab];
            its `config` names num_layers, num_query_groups and kv_channels (megatron-core's GPTModel does).
        num_pages: pages of the cache.
        page_size: tokens per page.
        debug: poison freed pages.
    """

    def __init__(self, model: nn.Module, *, num_pages: int, page_size: int, debug: bool = False) -> None:
        self.model = model.eval()
        weight = next(model.parameters())
        config: Any = model.config
        self.pool = PagePool(
            num_pages,
            page_size,
            num_layers=config.num_layers,
            num_kv_heads=config.num_query_groups,
            head_dim=config.kv_channels,
            dtype=weight.dtype,
            device=weight.device,
            debug=debug,
        )
        self._logit_tokens: Tensor | None = None
        self._selected = False
        output_layer = getattr(model, "output_layer", None)
        self._hook = (
            output_layer.register_forward_pre_hook(self._select_hidden) if isinstance(output_layer, nn.Module) else None
        )

    def close(self) -> None:
        """Take the hook off the model, which stays usable for anything else."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _select_hidden(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keep only the tokens whose logits are asked for: the vocabulary is wide, most tokens need none."""
        if self._logit_tokens is None:
            return None
        self._selected = True
        return (args[0].index_select(0, self._logit_tokens), *args[1:])

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> Tensor:
        """One forward pass.

        Returns:
            Logits [number of rows with `sample`, vocab], in row order.
        """
        batch = build_batch(rows, self.pool)
        logits = self._forward(batch)
        self.pool.settle()
        return logits

    def _forward(self, batch: StepBatch) -> Tensor:
        params = PagedParams(pool=self.pool, batch=batch)
        self._logit_tokens, self._selected = batch.logit_tokens, False
        try:
            logits: Tensor = self.model(batch.input_ids, batch.position_ids, None, packed_seq_params=params)
        finally:
            self._logit_tokens = None
        logits = logits[0]
        return logits if self._selected else logits.index_select(0, batch.logit_tokens)
