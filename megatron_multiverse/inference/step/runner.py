"""Runs one step on this rank: plan in, tokens out. The place for CUDA graphs, tensor and pipeline parallelism."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megatron_multiverse.inference.step.forward import PagedForward
from megatron_multiverse.inference.step.graphs import StepGraphs
from megatron_multiverse.inference.step.kv_store import KVStore, PagedParams
from megatron_multiverse.inference.step.plan import Floats, Ints, StepOutput, StepPlan
from megatron_multiverse.inference.step.sampler import CounterSampler, Sampler, choose, score
from megatron_multiverse.inference.step.tensors import StepTensors

MOST_ROWS = 1 << 16
"""Sampled rows of a step."""


class PendingOutput:
    """What a step gives back, once it has run.

    Args:
        device: where steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._host = torch.empty(256, dtype=torch.int64, pin_memory=self._event is not None)
        self._packed = self._host.view(2, -1)
        self._rows = 0
        self._scores: Tensor | None = None

    def fetch(self, packed: Tensor, rows: int, scores: Tensor | None = None) -> PendingOutput:
        """Begin to bring over the first `rows` of what `pack` made; what was fetched before is gone.

        `scores` are packed likewise; they are rare, and brought over by `wait`.
        """
        self._scores = scores
        if packed.numel() > len(self._host):
            self._host = torch.empty(2 * packed.numel(), dtype=torch.int64, pin_memory=self._event is not None)
        self._packed, self._rows = self._host[: packed.numel()].view(packed.shape), rows
        self._packed.copy_(packed, non_blocking=True)
        if self._event is not None:
            self._event.record()
        return self

    def wait(self) -> StepOutput:
        """The tokens and what is told about them."""
        if self._event is not None:
            self._event.synchronize()
        tokens, logprobs, top_ids, top_logprobs = _unpack(self._packed[:, : self._rows].numpy().copy())
        packed = np.empty((2, 0), dtype=np.int64) if self._scores is None else self._scores.cpu().numpy()
        _, scores, score_top_ids, score_top_logprobs = _unpack(packed)
        return StepOutput(
            tokens,
            logprobs,
            np.isfinite(logprobs),
            top_ids,
            top_logprobs,
            scores,
            score_top_ids,
            score_top_logprobs,
        )


def _unpack(packed: npt.NDArray[np.int64]) -> tuple[Ints, Floats, Ints, Floats]:
    """What `pack` packed."""
    middle = len(packed) // 2 + 1  # after two lines, as many of ids as of log-probabilities
    return packed[0], packed[1].view(np.float64), packed[2:middle].T, packed[middle:].view(np.float64).T


class Runner:
    """A model, its key/value store and a sampler.

    Args:
        model: called as ``model(input_ids, position_ids, None, packed_seq_params=params)`` -> logits [1, n, vocab];
            see `KVStore.for_model` for what its `config` names.
        num_pages: pages of the cache.
        page_size: tokens per page.
        vocab_size: ids of the tokenizer; the padding of the output layer above it is never chosen.
        sampler: draws tokens; by default `CounterSampler`.
        cuda_graphs: replay small steps as graphs where the model lives on a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_pages: int,
        page_size: int,
        vocab_size: int | None = None,
        sampler: Sampler | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self.model = model.eval()
        self.store = KVStore.for_model(model, num_pages, page_size)
        self.sampler: Sampler = sampler or CounterSampler()
        self.vocab_size = vocab_size
        self.last_tokens = torch.zeros(MOST_ROWS, dtype=torch.int64, device=self.store.keys.device)
        # Two in turns, since the next step is launched before this one's tokens are read.
        self._outputs = [PendingOutput(self.store.keys.device) for _ in range(2)]
        self._turn = 0
        on_gpu = self.store.keys.is_cuda and self.store.keys.dtype != torch.float64
        self.graphs: StepGraphs | None = None
        self.forward = PagedForward(model) if PagedForward.runs(model) else None
        if cuda_graphs and self.forward and on_gpu:
            self.graphs = StepGraphs(self.forward, self.store, self.last_tokens, vocab_size)
        self._logit_tokens: Tensor | None = None
        self._selected = False
        output_layer = None if self.forward else getattr(model, "output_layer", None)
        self._hook = (
            output_layer.register_forward_pre_hook(self._select_hidden) if isinstance(output_layer, nn.Module) else None
        )

    def close(self) -> None:
        """Take the hook off the model, which stays usable for anything else."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def run(self, plan: StepPlan) -> StepOutput:
        """Run a step and wait for its tokens."""
        return self.launch(plan).wait()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingOutput:
        """Copy what forks and joins ask for, run the model once, and draw a token for every row that wants one.

        On a GPU nothing is waited for. The next plan may name these tokens by `StepPlan.sources`.
        """
        store = self.store
        if len(plan.copies):
            store.copy(plan.copies)
        if len(plan.freed):
            store.poison(plan.freed)
        packed, scores = None, None
        if self.graphs is not None and not len(plan.scored):
            packed = self.graphs.launch(plan, self.sampler)
        if packed is None:
            packed, scores = self._run_eagerly(plan)
        rows = len(plan.sample)
        self.last_tokens[:rows] = packed[0, :rows]
        self._turn = 1 - self._turn
        return self._outputs[self._turn].fetch(packed, rows, scores)

    def _run_eagerly(self, plan: StepPlan) -> tuple[Tensor, Tensor | None]:
        step = StepTensors.upload(plan, self.store.keys.device, self.last_tokens)
        logits = self.forward(step, self.store) if self.forward else self._call_model(step)
        logits, rows = logits[:, : self.vocab_size], len(plan.sample)
        packed = choose(logits[:rows], plan.sampling, self.sampler, self.last_tokens)
        if not len(plan.scored):
            return packed, None
        return packed, score(logits[rows:], plan.targets, int(plan.num_scores.max()))

    def _call_model(self, step: StepTensors) -> Tensor:
        """What `PagedForward` does, by the model's own forward."""
        self._logit_tokens, self._selected = step.logit_tokens, False
        params = PagedParams(store=self.store, tensors=step)
        try:
            logits: Tensor = self.model(step.ids[None], step.positions[None], None, packed_seq_params=params)[0]
            return logits if self._selected else logits.index_select(0, step.logit_tokens)
        finally:
            self._logit_tokens = None

    def _select_hidden(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keep only the tokens whose logits are asked for: the vocabulary is wide, most tokens need none."""
        if self._logit_tokens is None:
            return None
        self._selected = True
        return (args[0].index_select(0, self._logit_tokens), *args[1:])
