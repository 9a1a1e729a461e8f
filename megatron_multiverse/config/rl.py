"""Configuration of reinforcement learning on parallel rollouts. Imports no torch.

`RLConfig` nests the others; the script reads it from YAML with dotted overrides, like `TrainConfig`, whose parts it
shares.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_multiverse.config.choices import DType, TokenizerType
from megatron_multiverse.config.engine import EngineConfig
from megatron_multiverse.config.layers import LayerConfig
from megatron_multiverse.config.parallel import ParallelConfig
from megatron_multiverse.config.sampling import SamplingParams
from megatron_multiverse.config.strict import check, check_choices, check_finite
from megatron_multiverse.config.train import CheckpointConfig, DataConfig, LogConfig, OptimConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Where the prompts come from."""

    input: str
    """Rows with a prompt and its right answer: whatever tools/preprocess_data.py takes (JSON Lines, Parquet, data sets
    of the hub)."""
    split: str | None = None
    """Split of a data set of the hub."""
    prompt_key: str = "prompt"
    """Column of the prompts."""
    answer_key: str = "answer"
    """Column of the right answers."""
    family_key: str = ""
    """Column that divides the prompts into families, whose answers are also reported apart; empty for none."""
    prompt_suffix: Literal["none", "parallel", "sequential"] = "none"
    """Sentence to put after each prompt, as tools/preprocess_data.py does."""
    chat: bool = False
    """Wrap each prompt in the chat template of the tokenizer."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """HuggingFaceTokenizer or SentencePieceTokenizer."""
    tokenizer_model: str = ""
    """Tokenizer folder, file or hub name; empty takes the one in init_from."""

    def __post_init__(self) -> None:
        check(bool(self.input), "task.input is empty: name a file of rows with a prompt and an answer")
        check_choices(self, "task.")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What an answer earns: whether it is right, plus what else is asked for, plus speed."""

    correct: str = "math"
    """What tells a right answer, 0 to 1, right above 0.5: exact (the words after the last "Answer:", or in the last
    box), math (the same value by math-verify), or a function of your own as package.module:function."""
    extra: dict[str, float] = field(default_factory=dict)
    """Further rewards by weight: format (1 where the answer ended by itself and broke no structure), exact, math, or
    functions of your own."""
    speed: float = 0.0
    """Bonus for a short longest chain, at right answers alone: speed x (1 - its critical tokens / the mean of the
    group's right answers), at most speed_cap and at least -speed_cap. 0 is off."""
    speed_cap: float = 0.2
    """Largest bonus or malus for speed; a slow right answer stays above a wrong one."""
    speed_anneal_iters: int = 0
    """Steps over which the bonus falls to zero, linearly; 0 keeps it."""

    def __post_init__(self) -> None:
        check_finite(self, "reward.")
        for name, weight in self.extra.items():
            check(math.isfinite(weight), f"reward.extra {name} must be finite, got {weight}")
        check(self.speed >= 0, f"reward.speed must not be negative, got {self.speed}")
        check(0 < self.speed_cap < 1, f"reward.speed_cap must lie between 0 and 1, got {self.speed_cap}")
        check(
            self.speed_anneal_iters >= 0,
            f"reward.speed_anneal_iters must not be negative, got {self.speed_anneal_iters}",
        )

    def speed_at(self, step: int) -> float:
        """The factor of the speed bonus after `step` steps."""
        if not self.speed_anneal_iters:
            return self.speed
        return self.speed * max(0.0, 1 - step / self.speed_anneal_iters)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How answers are drawn."""

    prompts_per_step: int = 16
    """Prompts whose answers make a step."""
    group_size: int = 8
    """Answers to each prompt; they share its pages in the cache, and are each other's baseline."""
    max_resamples: int = 2
    """Dynamic sampling: how often prompts whose answers all earned the same are replaced by others within a step."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=1024, temperature=1.0))
    """Where answers end, and limits on their branches. They are drawn from the model's own distribution (temperature 1,
    nothing filtered or penalised), which is the one that is trained; n and seed are set by the run."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Sizes and limits of the engine; num_pages 0 takes enough for all answers that can run at once."""
    free_cache: bool = False
    """Give the memory of the engine's cache to the trainer between rollouts; the engine is made anew for each step."""
    keep_records: int = 0
    """Answers of each step that are kept as records, with their rewards, in rollouts.jsonl of the run folder."""

    def __post_init__(self) -> None:
        check(self.prompts_per_step >= 1, f"rollout.prompts_per_step must be at least 1, got {self.prompts_per_step}")
        check(
            self.group_size >= 2,
            f"rollout.group_size must be at least 2, got {self.group_size}: answers are compared with each other",
        )
        for name in ("max_resamples", "keep_records"):
            check(getattr(self, name) >= 0, f"rollout.{name} must not be negative, got {getattr(self, name)}")
        # A copy: cached properties would stay in it, and the parser of command lines would take them for settings.
        sampling = dataclasses.replace(self.sampling)
        check(
            sampling.temperature == 1 and not sampling.is_shaped and not sampling.min_tokens,
            "rollout.sampling must leave the model's distribution as it is (temperature 1, no filters, penalties, "
            "biases, min_tokens or logprobs): what is drawn from another one has another gradient",
        )
        check(sampling.n == 1 and sampling.seed == 0, "leave rollout.sampling.n and .seed to group_size and seed")
        check(sampling.prompt_logprobs is None, "leave rollout.sampling.prompt_logprobs unset: nothing reads them")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How answers become an update: group-relative policy optimisation with DAPO's changes (arXiv 2503.14476)."""

    baseline: Literal["group", "leave_one_out"] = "group"
    """What a reward is compared with: the mean of its group, or of the other answers in it."""
    scale: Literal["std", "none"] = "std"
    """Divide advantages by the standard deviation of the group's rewards. With a speed bonus take none, or the smallest
    difference in length weighs as much as being right."""
    clip_low: float = 0.2
    """The ratio of new to old probability counts down to 1 - clip_low."""
    clip_high: float = 0.28
    """And up to 1 + clip_high, which leaves unlikely tokens more room to grow (clip-higher)."""
    kl_coef: float = 0.0
    """Weight of the divergence from the model of init_from, in nats per drawn token; 0 is off, as in DAPO. Above 0 that
    model stays in memory, and each update runs it once more."""
    updates_per_step: int = 1
    """Optimizer steps over each step's answers, each on a part of the groups."""
    share_prefix: bool = True
    """Lay the answers to a prompt out as one tree, so that the prompt is computed once; the numbers are the same."""
    seq_length: int = 4096
    """Tokens per packed row; a prompt and its longest answer must fit."""
    micro_batch_size: int = 1
    """Packed rows per forward pass."""

    def __post_init__(self) -> None:
        check_finite(self, "policy.")
        check(0 < self.clip_low < 1, f"policy.clip_low must lie between 0 and 1, got {self.clip_low}")
        check(self.kl_coef >= 0, f"policy.kl_coef must not be negative, got {self.kl_coef}")
        check(self.clip_high > 0, f"policy.clip_high must be positive, got {self.clip_high}")
        for name in ("updates_per_step", "seq_length", "micro_batch_size"):
            check(getattr(self, name) >= 1, f"policy.{name} must be at least 1, got {getattr(self, name)}")
        check_choices(self, "policy.")


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Everything one run of reinforcement learning needs."""

    init_from: str
    """Checkpoint to start from, in any format: a model that was trained on Multiverse data."""
    task: TaskConfig
    """The prompts."""
    checkpoint: CheckpointConfig
    """Saving and resuming."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What answers earn."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How answers are drawn."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """How they become an update."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-6, lr_decay_style="constant"))
    """Optimizer and schedule, counted in optimizer steps."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Ranks that hold one model between them: tensor_model_parallel_size. What that leaves of the ranks are replicas,
    each of which draws and trains answers to its share of the prompts."""
    layers: LayerConfig = field(default_factory=LayerConfig)
    """Attention kernel, layer spec and activation recompute of the trainer."""
    log: LogConfig = field(default_factory=lambda: LogConfig(log_interval=1))
    """Logging."""
    train_iters: int = 100
    """Steps of the whole run, resumed parts included; a step is one batch of answers."""
    seed: int = 1234
    """Seed of the order of prompts, of every answer and of every random generator."""
    dtype: DType = "float32"
    """float32 (TF32 on CUDA), bf16, float64 (tests on one rank). With bf16 the engine runs a bf16 copy of the float32
    weights; on several ranks, and with rollout.engine.round_as_trained, the model is bf16 for trainer and engine, and
    the optimizer has the float32 weights."""
    deterministic: bool = False
    """The same bits in every run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is a GPU."""

    def __post_init__(self) -> None:
        check(bool(self.init_from), "init_from is empty: name the checkpoint of a model trained on Multiverse data")
        check(self.train_iters >= 1, f"train_iters must be at least 1, got {self.train_iters}")
        check_choices(self, "")
        check(
            self.layers.fp8 is None, "layers.fp8 must be unset: the engine's probabilities would not be the trainer's"
        )
        groups, parts = self.rollout.prompts_per_step, self.policy.updates_per_step
        check(
            parts <= groups,
            f"policy.updates_per_step ({parts}) must not exceed rollout.prompts_per_step ({groups}): each update takes "
            "whole groups",
        )
        engine = self.rollout.engine
        check(
            engine.quantization == "none" or self.parallel.tensor_model_parallel_size == 1,
            f"rollout.engine.quantization {engine.quantization} runs on one rank, "
            f"parallel.tensor_model_parallel_size is {self.parallel.tensor_model_parallel_size}: leave one of them out",
        )
        self._check_parallel()
        if not self.optim.lr_decay_iters:
            steps, warmup = self.train_iters * parts, self.optim.lr_warmup_iters
            check(
                warmup < steps,
                f"optim.lr_warmup_iters ({warmup}) counts optimizer steps and must be below train_iters x "
                f"policy.updates_per_step ({self.train_iters} x {parts}): lower it, or raise those",
            )
        self.train_config()  # checks what the parts have in common

    def _check_parallel(self) -> None:
        parallel = self.parallel
        for name in ("pipeline_model_parallel_size", "context_parallel_size"):
            check(
                getattr(parallel, name) == 1,
                f"parallel.{name} must be 1 here, got {getattr(parallel, name)}: spread a model that is too large for "
                "one GPU with parallel.tensor_model_parallel_size",
            )
        check(
            not parallel.sequence_parallel,
            "parallel.sequence_parallel must be false here: logits are made for drawn tokens alone, which stand "
            "anywhere in a row",
        )
        check(
            self.rollout.prompts_per_step >= parallel.data_parallel_size,
            f"rollout.prompts_per_step ({self.rollout.prompts_per_step}) must be at least the number of replicas "
            f"({parallel.data_parallel_size}), each of which draws answers to its share",
        )

    @property
    def tokenizer_model(self) -> str:
        """Where the tokenizer is."""
        return self.task.tokenizer_model or self.init_from

    def train_config(self) -> TrainConfig:
        """The same run as the training machinery sees it: model, optimizer, precision, rows."""
        return TrainConfig(
            data=DataConfig(
                data_prefixes=("rollouts",),
                tokenizer_type=self.task.tokenizer_type,
                tokenizer_model=self.tokenizer_model,
                seq_length=self.policy.seq_length,
                micro_batch_size=self.policy.micro_batch_size,
                global_batch_size=self.policy.micro_batch_size * self.parallel.data_parallel_size,
                num_workers=0,
            ),
            checkpoint=self.checkpoint,
            init_from=self.init_from,
            layers=self.layers,
            parallel=self.parallel,
            # Its weights are bf16 themselves, as the engine's are; one_process would compute a finer residual stream.
            engine="megatron" if self.dtype == "bf16" and self.rollout.engine.round_as_trained else "auto",
            optim=self.optim,
            log=self.log,
            train_iters=self.train_iters * self.policy.updates_per_step,
            seed=self.seed,
            dtype=self.dtype,
            deterministic=self.deterministic,
            device=self.device,
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return dataclasses.asdict(self)
