"""Groups of answers: drawn by an engine over the weights that are being trained, graded, compared."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from megatron_multiverse.config import LayerConfig, ModelConfig, RLConfig
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import TrainingError
from megatron_multiverse.inference import Engine, Request, Result, answer_text
from megatron_multiverse.inference.step.runner import Runner
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.weights import copy_weights
from megatron_multiverse.rl.advantages import group_advantages, is_settled
from megatron_multiverse.rl.drawing import Drawing
from megatron_multiverse.rl.prompts import Prompt, Prompts
from megatron_multiverse.rl.replica import Replica
from megatron_multiverse.rl.rewards import Graded, Grader
from megatron_multiverse.training.start import weights_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """The answers to one prompt; arrays are [answers]."""

    number: int
    """Of the prompt, in the run."""
    prompt: Prompt
    results: list[Result]
    texts: list[str]
    correct: npt.NDArray[np.float64]
    rewards: npt.NDArray[np.float64]
    advantages: npt.NDArray[np.float64]

    @property
    def is_settled(self) -> bool:
        """Whether all answers earned the same, so that nothing can be learned from them."""
        return is_settled(self.rewards)


@dataclass
class Batch:
    """What a step drew."""

    groups: list[Group] = field(default_factory=list)
    """All groups; those that are settled are not trained on."""
    rollout_s: float = 0.0
    reward_s: float = 0.0

    @property
    def useful(self) -> list[Group]:
        """The groups to learn from."""
        return [group for group in self.groups if not group.is_settled]

    @property
    def results(self) -> list[Result]:
        """All answers."""
        return [result for group in self.groups for result in group.results]


class Rollouts:
    """Draws the answers of a run.

    The engine runs the very model that is trained, so an optimizer's step is all the hand-over there is. Where the
    trained weights are float32 and dtype is bf16, which is so on one rank, it runs a bf16 copy of them; with
    `engine.quantization` a copy, too, whose products are rounded anew after every step.

    Over several ranks each replica draws answers to its share of the prompts. The noise of an answer follows from the
    seed and the number of its prompt in the run, so they are the answers of one process.

    Args:
        config: the run.
        model: what is trained, this rank's part.
        model_config: its shape.
        layers: how the trainer computes it.
        tokenizer: of the model.
        drawing: what is asked for each prompt, and the sizes of the engine.
        replica: this rank's share of the prompts.

    Raises:
        ConfigError: a reward cannot be found.
    """

    def __init__(
        self,
        config: RLConfig,
        model: nn.Module,
        model_config: ModelConfig,
        layers: LayerConfig,
        tokenizer: MultiverseTokenizer,
        drawing: Drawing,
        replica: Replica,
    ) -> None:
        self.config, self.tokenizer, self._trained, self.replica = config, tokenizer, model, replica
        self.grader = Grader(config.reward)
        self._drawing = drawing
        self._played = model
        weight, played = next(model.parameters()), played_dtype(config)
        if has_own_model(config):
            layers = LayerConfig(transformer_impl=layers.transformer_impl)
            self._played = build_gpt_model(
                model_config, dtype=played, device=weight.device, initialize=False, layers=layers
            )
        self._engine: Engine | None = None
        self._runner: Runner | None = None
        """What runs the steps on this rank: the engine's, or one that follows the first rank of the replica."""

    def close(self) -> None:
        """Let go of the model and of the cache; the next step takes them again."""
        if self._runner is not None:
            self._runner.close(release=False)  # none follows between two draws
        self._engine = self._runner = None

    def use_weights(self, version: int) -> None:
        """Go on with the trained weights as they are now, under this version."""
        if self._played is not self._trained:
            copy_weights(self._trained, self._played)
        if self._runner is None:
            if self.replica.is_first:
                self._engine = Engine(
                    self._played,
                    self.tokenizer.structure_vocab,
                    self._drawing.engine,
                    vocab_size=self.tokenizer.vocab_size,
                    detokenize=self.tokenizer.detokenize,
                )
                self._runner = self._engine.runner
            else:
                self._runner = Runner(self._played, num_pages=0, page_size=0)
            self._trained.train()  # the engine switches it off, and activation recompute looks at it
        if self._engine is not None:
            self._engine.use_weights(version)

    def draw(self, prompts: Prompts, step: int, is_stopping: Callable[[], bool]) -> Batch | None:
        """The answers of a step. Prompts whose answers all earned the same are replaced, a bounded number of times.

        Args:
            prompts: where the next ones come from.
            step: steps done; `use_weights` has been called for it.
            is_stopping: whether to leave off; then the prompts stand where they stood, so that a run that goes on draws
                the same answers again.

        Returns:
            This replica's part of them; on its first rank, the others get a batch without groups. None if it was left
            off, by a signal to any rank.

        Raises:
            TrainingError: an answer ended with an error, or a reward failed.
        """
        rollout, batch, position = self.config.rollout, Batch(), prompts.state_dict()
        for _ in range(1 + rollout.max_resamples):
            wanted = rollout.prompts_per_step - self.replica.ranks.sum([len(batch.useful)])[0]
            if wanted <= 0:
                break
            asked = self.replica.share([prompts.draw() for _ in range(wanted)])
            if self.replica.ranks.any(not self._draw_groups(batch, asked, step, is_stopping)):
                prompts.load_state_dict(position)
                return None
        if rollout.free_cache:
            self.close()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return batch

    def _draw_groups(
        self, batch: Batch, asked: Sequence[tuple[int, Prompt]], step: int, is_stopping: Callable[[], bool]
    ) -> bool:
        """Add the groups of some prompts; False if that was left off."""
        started, size = time.perf_counter(), self.config.rollout.group_size
        results = self._answer([self.request(number, prompt) for number, prompt in asked], is_stopping)
        if results is None:
            return False
        drawn = time.perf_counter()
        for k, (number, prompt) in enumerate(asked if self.replica.is_first else ()):
            batch.groups.append(self._grade(number, prompt, results[k * size : (k + 1) * size], step))
        batch.rollout_s += drawn - started
        batch.reward_s += time.perf_counter() - drawn
        return True

    def request(self, number: int, prompt: Prompt) -> Request:
        """What is asked of the engine for the prompt of this number: a group of answers, with noise of its own."""
        seed = (self.config.seed << 32) + number
        return Request(prompt_ids=prompt.ids, sampling=dataclasses.replace(self._drawing.sampling, seed=seed))

    def _answer(self, requests: Sequence[Request], is_stopping: Callable[[], bool]) -> list[Result] | None:
        """All answers, in the order of the requests; None if that was left off. The ranks that follow the first one of
        a replica have none."""
        assert self._runner is not None, "use_weights comes first"
        if self._engine is None:
            self._runner.follow()
            return []
        ids = [
            first + k
            for request in requests
            for first in [self._engine.add_request(request)]
            for k in range(request.sampling.n)
        ]
        found: dict[int, Result] = {}
        while self._engine.has_work:
            if is_stopping():
                self._runner.release_ranks()
                self.close()  # an engine is quickly made, and what it was doing ends with it
                return None
            found |= {result.request_id: result for result in self._engine.step()}
        self._runner.release_ranks()
        return [found[request_id] for request_id in ids]

    def _grade(self, number: int, prompt: Prompt, results: list[Result], step: int) -> Group:
        for result in results:
            if result.finish_reason == "error":
                raise TrainingError(f"an answer to {prompt.text[-200:]!r} ended with an error: {result.error}")
        texts = [answer_text(result, self.tokenizer.detokenize) for result in results]
        graded = [Graded(prompt, text, result) for text, result in zip(texts, results, strict=True)]
        correct, rewards = self.grader.grade(graded, step)
        policy = self.config.policy
        advantages = group_advantages(rewards, baseline=policy.baseline, scale=policy.scale)
        return Group(number, prompt, results, texts, correct, rewards, advantages)


def played_dtype(config: RLConfig) -> torch.dtype:
    """dtype of the weights that the engine runs."""
    return torch.bfloat16 if config.dtype == "bf16" else weights_dtype(config.train_config())


def has_own_model(config: RLConfig) -> bool:
    """Whether the engine runs a copy of the trained weights: of another dtype, or with rounded products."""
    return played_dtype(config) != weights_dtype(config.train_config()) or config.rollout.engine.quantization != "none"
