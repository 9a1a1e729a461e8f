"""Runs one step on this rank: plan in, tokens out. Where a model is spread over ranks, the first one's runner hands its
plans on, and the others' `follow` them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megatron_multiverse.config.choices import Quantization
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference.step.forward import KVStore, PagedForward, StepTensors
from megatron_multiverse.inference.step.graph_sizes import MOST_SEEN
from megatron_multiverse.inference.step.graphs import StepGraphs
from megatron_multiverse.inference.step.model_forward import ModelForward
from megatron_multiverse.inference.step.model_ranks import ModelRanks, PlanChannel
from megatron_multiverse.inference.step.plan import Floats, Ints, StepOutput, StepPlan
from megatron_multiverse.inference.step.quantize import quantize_products
from megatron_multiverse.inference.step.sampler import CounterSampler, Sampler, choose, score

MOST_ROWS = 1 << 16
"""Sampled rows of a step."""


class PendingOutput:
    """What a step gives back, once it has run.

    Args:
        device: where steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._pinned = torch.empty(256, dtype=torch.int64, pin_memory=self._event is not None)
        # By shape, since making them takes as long as the copy that is launched.
        self._views: dict[torch.Size, tuple[Tensor, Ints]] = {}
        self._packed: Ints = np.empty((2, 0), dtype=np.int64)
        self._rows = 0
        self._scores: Tensor | None = None
        self._output: StepOutput | None = None

    def fetch(self, packed: Tensor, rows: int, scores: Tensor | None = None) -> PendingOutput:
        """Begin to bring over the first `rows` of what `pack` made; what was fetched before is gone.

        `scores` are packed likewise; they are rare, and brought over by `wait`.
        """
        self._rows, self._scores, self._output = rows, scores, None
        if self._event is None:
            self._packed = packed.numpy()
            return self
        there, self._packed = self._views.get(packed.shape) or self._view(packed)
        there.copy_(packed, non_blocking=True)
        self._event.record()
        return self

    def _view(self, packed: Tensor) -> tuple[Tensor, Ints]:
        """Where something of that shape is fetched to, as a tensor and an array."""
        if packed.numel() > len(self._pinned):
            self._pinned = torch.empty(2 * packed.numel(), dtype=torch.int64, pin_memory=True)
            self._views.clear()
        view = self._pinned[: packed.numel()].view(packed.shape)
        self._views[packed.shape] = view, view.numpy()
        return self._views[packed.shape]

    def wait(self) -> StepOutput:
        """The tokens and what is told about them; the same object when it is asked again."""
        if self._output is None:
            self._output = self._read()
        return self._output

    def _read(self) -> StepOutput:
        packed = self._packed[:, : self._rows]
        if self._event is not None:
            self._event.synchronize()
            packed = packed.copy()  # the step after the next one is fetched to the same place
        tokens, logprobs, top_ids, top_logprobs = _unpack(packed)
        of_targets = _NO_SCORES if self._scores is None else _unpack(self._scores.cpu().numpy())
        return StepOutput(tokens, logprobs, np.isfinite(logprobs), top_ids, top_logprobs, *of_targets[1:])


def _unpack(packed: npt.NDArray[np.int64]) -> tuple[Ints, Floats, Ints, Floats]:
    """What `pack` packed."""
    middle = len(packed) // 2 + 1  # after two lines, as many of ids as of log-probabilities
    return packed[0], packed[1].view(np.float64), packed[2:middle].T, packed[middle:].view(np.float64).T


_NO_SCORES = _unpack(np.empty((2, 0), dtype=np.int64))


class Runner:
    """A model, its key/value store and a sampler.

    Args:
        model: called as ``model(input_ids, position_ids, None, packed_seq_params=params)`` -> logits [1, n, vocab];
            see `KVStore.for_model` for what its `config` names.
        num_pages: pages of the cache; this and the next two are those of the first rank on all that share a model.
        page_size: tokens per page.
        vocab_size: ids of the tokenizer; the padding of the output layer above it is never chosen.
        sampler: draws tokens; by default `CounterSampler`.
        cuda_graphs: replay steps as graphs, but the largest, where the model lives on a GPU.
        round_as_trained: see `EngineConfig.round_as_trained`; of the first rank like the sizes.
        quantization: see `EngineConfig.quantization`; changes the model in place.

    Raises:
        ConfigError: the model cannot be quantised.
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
        round_as_trained: bool = False,
        quantization: Quantization = "none",
    ) -> None:
        self.model = model.eval()
        self.ranks = ModelRanks.current()
        self._channel = PlanChannel() if self.ranks.size > 1 else None
        if self._channel is not None:
            sizes = (num_pages, page_size, vocab_size or 0, int(round_as_trained))
            num_pages, page_size, ids, rounds = self._channel.agree(*sizes)
            vocab_size, round_as_trained = ids or None, bool(rounds)
        self.store = KVStore.for_model(model, num_pages, page_size)
        self.ranks = self.ranks.on(self.store.keys, model.config)
        self.sampler: Sampler = sampler or CounterSampler()
        self.vocab_size = vocab_size
        self.last_tokens = torch.zeros(MOST_ROWS, dtype=torch.int64, device=self.store.keys.device)
        # Two in turns, since the next step is launched before this one's tokens are read.
        self._outputs = [PendingOutput(self.store.keys.device) for _ in range(2)]
        self._turn = 0
        on_gpu = self.store.keys.is_cuda and self.store.keys.dtype != torch.float64
        self.graphs: StepGraphs | None = None
        self.forward: PagedForward | ModelForward
        if quantization != "none":
            if not PagedForward.runs(model):
                raise ConfigError(
                    f"quantization {quantization} needs a model made by build_gpt_model, not in FP8 already"
                )
            quantize_products(model, self.ranks)
        if PagedForward.runs(model):
            self.forward = PagedForward(model, self.ranks, round_as_trained=round_as_trained)
            if cuda_graphs and on_gpu and self.ranks.stages == 1:
                self.graphs = StepGraphs(self.forward, self.store, self.last_tokens, vocab_size)
        else:
            self.forward = ModelForward(model, self.ranks)

    def long_prompt(self, chunk: int) -> int:
        """Length of a prompt whose last chunk is read call by call, by other kernels than graphs have, however small
        the model; on a CPU a short one, since all are read alike.

        Args:
            chunk: tokens of prompts per step.
        """
        return chunk * (MOST_SEEN // chunk**2 + 2) if self.store.keys.is_cuda else 16

    def close(self, *, release: bool = True) -> None:
        """Let go of the model, which stays usable for anything else; the ranks that follow this one stop.

        Args:
            release: there are ranks that follow; false after `release_ranks`, which has told them to stop.
        """
        if release:
            self.release_ranks()
        self._channel = None
        if isinstance(self.forward, ModelForward):
            self.forward.close()

    def release_ranks(self) -> None:
        """Let the ranks that follow this one return from `follow`; they must follow again before the next step."""
        if self._channel is not None and self.ranks.is_first:
            self._channel.send(None)

    def run(self, plan: StepPlan) -> StepOutput:
        """Run a step and wait for its tokens."""
        return self.launch(plan).wait()

    def follow(self) -> None:
        """Run the plans of the first rank until its runner is closed; for all other ranks."""
        assert self._channel is not None, "there are no other ranks"
        while (plan := self._channel.receive()) is not None:
            self.launch(plan)

    @torch.inference_mode()
    def prepare(self, plan: StepPlan) -> Callable[[], Tensor] | None:
        """Upload a step while the one before still decides whether it is to run; the next one may be prepared, too.

        Returns:
            What replays it, for `launch`; None if it is not a graph's, or if other ranks must be told of it first.
        """
        if self.graphs is None or self._channel is not None or len(plan.scored):
            return None
        return self.graphs.prepare(plan, self.sampler)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, replay: Callable[[], Tensor] | None = None) -> PendingOutput:
        """Copy what forks and joins ask for, run the model once, and draw a token for every row that wants one.

        On a GPU nothing is waited for. The next plan may name these tokens by `StepPlan.sources`.

        Args:
            plan: the step.
            replay: what `prepare` has made of it.
        """
        if self._channel is not None and self.ranks.is_first:
            self._channel.send(plan)
        if len(plan.copies):
            self.store.copy(plan.copies)
        if len(plan.freed):
            self.store.poison(plan.freed)
        if replay is None and self.graphs is not None and not len(plan.scored):
            replay = self.graphs.prepare(plan, self.sampler)  # while the GPU copies
        device, rows, has_scores = self.store.keys.device, len(plan.sample), len(plan.scored) > 0
        packed = None if replay is None else replay()
        scores: Tensor | None = None
        if packed is None:
            logits = self.forward(StepTensors.upload(plan, device, self.last_tokens), self.store)
            if logits is not None:
                if self.vocab_size is not None:
                    logits = logits[:, : self.vocab_size]
                if has_scores:
                    scores = score(logits[rows:], plan.targets, int(plan.num_scores.max()))
                    logits = logits[:rows]
                packed = choose(logits, plan.sampling, self.sampler, self.last_tokens)
            if self.ranks.stages > 1:
                packed = self.ranks.from_last_stage(packed, device)
                scores = self.ranks.from_last_stage(scores, device) if has_scores else None
            assert packed is not None, "logits come out on the only stage"
            if self.graphs is None:
                self.last_tokens = packed[0]
            else:  # graphs read them at the address where they were captured
                self.last_tokens[:rows] = packed[0]
        self._turn = 1 - self._turn
        return self._outputs[self._turn].fetch(packed, rows, scores)
