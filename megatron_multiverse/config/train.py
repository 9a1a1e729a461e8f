"""Configuration of a training run: frozen dataclasses that check themselves. Imports no torch.

`TrainConfig` nests the others. The scripts read it from YAML with dotted overrides (`cli.parse_options`). Unknown
keys are errors; every error names the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_multiverse.config.choices import DType, TokenizerType
from megatron_multiverse.config.deepspeed import DeepSpeedConfig
from megatron_multiverse.config.layers import LayerConfig
from megatron_multiverse.config.model import ModelConfig
from megatron_multiverse.config.parallel import ParallelConfig
from megatron_multiverse.config.strict import check, check_choices, check_finite, dataclass_from_mapping


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-5
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up from zero."""
    lr_decay_style: Literal["cosine", "wsd", "constant"] = "cosine"
    """Schedule after the warm-up; wsd holds lr and decays over the last lr_wsd_decay_iters steps."""
    lr_decay_iters: int = 0
    """Step at which the decay has reached min_lr; 0 means train_iters. Set it (or take constant) where a run may be
    made longer: 0 ties the decay to train_iters, so raising train_iters later changes the learning rates that the
    finished steps should have had."""
    lr_wsd_decay_iters: int = 0
    """Length of the wsd decay in steps; 0 means a tenth of lr_decay_iters."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices (never on norms and biases)."""
    adam_beta1: float = 0.9
    """AdamW beta1."""
    adam_beta2: float = 0.95
    """AdamW beta2."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off (the norm is still logged)."""
    implementation: Literal["torch", "transformer_engine", "apex"] = "torch"
    """Whose fused AdamW kernel updates the weights: torch's, which runs everywhere, or on a GPU TransformerEngine's or
    NVIDIA apex's."""

    def __post_init__(self) -> None:
        check_finite(self, "optim.")
        check(self.lr > 0, f"optim.lr must be positive, got {self.lr}")
        check(0 <= self.min_lr <= self.lr, f"optim.min_lr ({self.min_lr}) must lie in [0, optim.lr={self.lr}]")
        names = ("lr_warmup_iters", "lr_decay_iters", "lr_wsd_decay_iters", "weight_decay", "adam_eps", "clip_grad")
        for name in names:
            check(getattr(self, name) >= 0, f"optim.{name} must not be negative, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            check(0 <= getattr(self, name) < 1, f"optim.{name} must lie in [0, 1), got {getattr(self, name)}")
        check_choices(self, "optim.")

    def wsd_decay_iters(self, decay_iters: int) -> int:
        """Length of the wsd decay of a schedule over so many steps."""
        return self.lr_wsd_decay_iters or max(1, decay_iters // 10)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how it is cut into batches."""

    data_prefixes: tuple[str, ...]
    """.bin/.idx prefixes written by tools/preprocess_data.py. Their documents are one data set, without weights as in
    Megatron's --data-path: each is seen once in an epoch, twice where its prefix is named twice."""
    plain_prefixes: tuple[str, ...] = ()
    """Prefixes of rows without blocks, for mixture."""
    mixture: tuple[float, ...] = ()
    """Share of the rows of data_prefixes in each epoch, the rest to one that of plain_prefixes; the last share holds
    for all later epochs. The paper's is [0, 0, 0.1, 0.5, 0.5, 0.9, 1, 1]. Empty takes all of data_prefixes in every
    epoch."""
    valid_prefixes: tuple[str, ...] = ()
    """Prefixes of the validation set; empty switches validation off."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """HuggingFaceTokenizer or SentencePieceTokenizer."""
    tokenizer_model: str = ""
    """Folder, hub name or model file of the tokenizer that wrote the data; the ids of the tags are read from it."""
    seq_length: int = 2048
    """Tokens per packed row."""
    micro_batch_size: int = 1
    """Packed rows per forward pass."""
    global_batch_size: int = 1
    """Packed rows per optimizer step over all ranks; a multiple of micro_batch_size x data parallel size."""
    train_forced_tokens: bool = False
    """Also train the tokens the engine forces (path labels and the like); see docs/decisions.md, entry 3."""
    overlong: Literal["drop", "refuse"] = "refuse"
    """What happens to samples longer than seq_length: refuse raises with the sample number, drop skips and counts
    them."""
    malformed: Literal["refuse", "drop", "causal"] = "refuse"
    """What happens to samples whose structure breaks the grammar: refuse raises with the sample number, drop trains
    none of their tokens, causal trains them as plain text; both report each."""
    num_workers: int = 2
    """Loader processes; 0 loads in the training process."""

    def __post_init__(self) -> None:
        check(len(self.data_prefixes) > 0, "data.data_prefixes is empty: name at least one .bin/.idx prefix")
        for name in ("seq_length", "micro_batch_size", "global_batch_size"):
            check(getattr(self, name) >= 1, f"data.{name} must be at least 1, got {getattr(self, name)}")
        check(self.num_workers >= 0, f"data.num_workers must not be negative, got {self.num_workers}")
        wrong = [share for share in self.mixture if not 0 <= share <= 1]
        check(not wrong, f"data.mixture must hold shares in [0, 1], got {wrong}")
        check(
            bool(self.mixture) == bool(self.plain_prefixes),
            "data.mixture and data.plain_prefixes go together: the mixture says how much of either kind an epoch has. "
            f"Got mixture {list(self.mixture)} and plain_prefixes {list(self.plain_prefixes)}: set both or neither",
        )
        check_choices(self, "data.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where and how often the training state is saved."""

    save: str
    """Run folder. Here go the checkpoints (iter_0000010, ...), metrics.jsonl, the newest config.json, and for each
    start of the run the config that it had (config_0000010.json: in force from step 10 on)."""
    save_interval: int = 1000
    """Steps between checkpoints; 0 saves only at the end and on a signal."""
    keep_last: int = 2
    """Number of newest checkpoints that stay on disk; 0 keeps all."""
    async_save: bool = False
    """Write checkpoints beside the training, which waits for a copy of its state in host memory alone; one comes into
    force once all ranks have written their files."""
    resume: bool = True
    """Continue from the newest checkpoint in `save`, if any; false refuses a folder that has one."""

    def __post_init__(self) -> None:
        check(bool(self.save), "checkpoint.save is empty: name the run folder")
        check(
            self.save_interval >= 0,
            f"checkpoint.save_interval must not be negative, got {self.save_interval}",
        )
        check(self.keep_last >= 0, f"checkpoint.keep_last must not be negative, got {self.keep_last}")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported."""

    log_interval: int = 10
    """Steps between log lines (the only steps that wait for the device)."""
    peak_tflops: float | None = None
    """Peak of the device in TFLOP/s for MFU; unset looks the device up by name, unknown devices show n/a."""
    straggler_percent: float = 10.0
    """Warn of a rank whose wait for data and forward passes take so many percent longer than the median of the ranks,
    over at least ten steps; 0 never compares them."""
    tensorboard: bool = False
    """Also write the numbers of metrics.jsonl for TensorBoard, in the folder tensorboard of the run folder."""
    wandb_project: str | None = None
    """Also send them to this project of Weights & Biases; a resumed run goes on there under the id in wandb_run_id of
    the run folder."""

    def __post_init__(self) -> None:
        check_finite(self, "log.")
        check(self.log_interval >= 1, f"log.log_interval must be at least 1, got {self.log_interval}")
        peak = self.peak_tflops
        check(peak is None or peak > 0, f"log.peak_tflops must be positive, got {peak}")
        percent = self.straggler_percent
        check(percent >= 0, f"log.straggler_percent must not be negative, got {percent}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything one training run needs."""

    data: DataConfig
    """Data and batch sizes."""
    checkpoint: CheckpointConfig
    """Saving and resuming."""
    model: ModelConfig | None = None
    """Shape of a fresh model; leave unset with model_preset or init_from."""
    model_preset: str | None = None
    """Name of a published shape for a fresh model, e.g. qwen2.5-7b; model/families.py lists them."""
    init_from: str | None = None
    """Checkpoint to start from, weights and config: Hugging Face, megatron-core, or a model folder of the trainer."""
    add_control_tokens: bool = False
    """Make rows for the structure tags that the tokenizer of init_from lacks, each the mean of the rows of the pieces
    of its text, as tools/convert_checkpoint.py --add-control-tokens does. Without it such a model is refused."""
    layers: LayerConfig = field(default_factory=LayerConfig)
    """Attention kernel, layer spec, FP8 and activation recompute."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallel sizes."""
    engine: Literal["auto", "one_process", "megatron", "deepspeed"] = "auto"
    """What computes the steps: one_process (one rank), megatron (megatron-core's schedules and distributed optimizer,
    any number of ranks), or deepspeed (ZeRO); auto takes the first that can run."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """ZeRO stage and offloading, for engine deepspeed."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logging."""
    train_iters: int = 1000
    """Optimizer steps of the whole run, resumed parts included."""
    seed: int = 1234
    """Seed of weights, data order and every random generator."""
    dtype: DType = "float32"
    """float32 (TF32 on CUDA), bf16 (bf16 matrix products), float64 (tests, one_process only). For bf16 one_process
    keeps float32 weights and rounds them in each pass (autocast), the others keep bf16 weights and float32 ones in
    their optimizer."""
    deterministic: bool = False
    """The same bits in every run, by torch.use_deterministic_algorithms; attention's backward pass then costs a tenth
    more. torch warns of each operation that has no deterministic form."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is a GPU."""
    eval_interval: int = 0
    """Steps between validations; 0 validates at the end only, if there is a validation set."""
    eval_iters: int = 10
    """Microbatches per validation on each data parallel rank, always the same ones; fewer where that is the whole
    validation set, of which no row counts twice."""
    eval_prompts: int = 0
    """Prompts of the validation set that the model answers freely at each validation, always the first ones; not with
    ZeRO 3 or an interleaved pipeline. 0 answers none."""
    eval_tokens: int = 512
    """Most tokens of such an answer."""

    def __post_init__(self) -> None:
        given = [name for name in ("model", "model_preset", "init_from") if getattr(self, name) is not None]
        null = ", or pass --model null" if "model" in given else ""
        remedy = f": take the others out of the config file{null}" if given else ""
        check(
            len(given) == 1,
            "give exactly one of `model` and `model_preset` (fresh weights) and `init_from` (a saved model folder), "
            f"got {' and '.join(given) or 'none'}{remedy}",
        )
        check(
            self.init_from is not None or not self.add_control_tokens,
            "add_control_tokens has no effect without init_from: a fresh model has random rows for all tokens alike",
        )
        check(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        check(self.train_iters >= 1, f"train_iters must be at least 1, got {self.train_iters}")
        check(self.eval_interval >= 0, f"eval_interval must not be negative, got {self.eval_interval}")
        check(self.eval_iters >= 1, f"eval_iters must be at least 1, got {self.eval_iters}")
        self._check_eval_prompts()
        check_choices(self, "")
        warmup, name = (
            self.optim.lr_warmup_iters,
            "optim.lr_decay_iters" if self.optim.lr_decay_iters else "train_iters",
        )
        end = self.optim.lr_decay_iters or self.train_iters
        check(warmup < end, f"optim.lr_warmup_iters ({warmup}) must be below {name} ({end}): lower it, or raise that")
        falling = self.optim.wsd_decay_iters(end)
        check(
            self.optim.lr_decay_style != "wsd" or warmup + falling <= end,
            f"optim.lr_warmup_iters ({warmup}) and the {falling} steps over which wsd lets the learning rate fall "
            f"(optim.lr_wsd_decay_iters, by default a tenth of all) must not exceed {name} ({end}) together: lower "
            "them, or raise that",
        )
        tokens = self.data.micro_batch_size * self.data.seq_length
        parts = self.parallel.token_parts
        check(
            self.layers.fp8 is None or (self.dtype == "bf16" and tokens % (16 * parts) == 0),
            "layers.fp8 needs dtype bf16 and a multiple of 16 tokens per microbatch on each rank, got dtype "
            f"{self.dtype} and {self.data.micro_batch_size} x {self.data.seq_length} tokens over {parts} ranks",
        )
        self._check_parallel()
        if self.model is not None:
            check_sequence_length(self.data, self.model)

    def _check_eval_prompts(self) -> None:
        check(self.eval_prompts >= 0, f"eval_prompts must not be negative, got {self.eval_prompts}")
        check(self.eval_tokens >= 1, f"eval_tokens must be at least 1, got {self.eval_tokens}")
        if self.eval_prompts == 0:
            return
        check(
            bool(self.data.valid_prefixes),
            f"eval_prompts {self.eval_prompts} come from data.valid_prefixes, which is empty: name a validation set",
        )
        instead = "set it to 0, and let tools/generate.py --load answer from a checkpoint of the run"
        check(
            self.runs_on != "deepspeed" or self.deepspeed.zero_stage < 3,
            f"eval_prompts {self.eval_prompts} needs whole weights, which deepspeed.zero_stage 3 cuts up: {instead}; "
            "or take stage 1 or 2",
        )
        check(
            self.parallel.virtual_pipeline_model_parallel_size == 1,
            f"eval_prompts {self.eval_prompts} does not go with an interleaved pipeline, whose stages hold several "
            f"pieces of the model (parallel.virtual_pipeline_model_parallel_size): {instead}; or leave that size at 1",
        )

    def _check_parallel(self) -> None:
        world = self.parallel.world_size
        check(
            self.engine != "one_process" or world == 1,
            f"engine one_process runs on one rank, but WORLD_SIZE is {world}: set engine to auto or megatron, or start "
            "one process",
        )
        check(
            self.dtype != "float64" or self.runs_on == "one_process",
            f"dtype float64 is for engine one_process on one rank; {self.runs_on} takes float32 and bf16",
        )
        self._check_deepspeed()
        ranks = self.parallel.data_parallel_size
        at_once = self.data.micro_batch_size * ranks
        check(
            self.data.global_batch_size % at_once == 0,
            f"data.global_batch_size ({self.data.global_batch_size}) must be divisible by "
            f"data.micro_batch_size ({self.data.micro_batch_size}) x data parallel size ({ranks}): make it a multiple "
            f"of {at_once}, or start another number of ranks",
        )
        self.parallel.check_rows(self.data.seq_length, self.num_microbatches)
        if self.data.valid_prefixes:
            self.parallel.check_rows(self.data.seq_length, self.eval_iters)

    def _check_deepspeed(self) -> None:
        if self.engine != "deepspeed":
            check(
                self.deepspeed == DeepSpeedConfig(),
                f"the settings deepspeed.* have no effect with engine {self.engine}: set engine to deepspeed, or leave "
                "them out",
            )
            return
        parallel = self.parallel
        check(
            parallel.pipeline_model_parallel_size == 1,
            f"parallel.pipeline_model_parallel_size {parallel.pipeline_model_parallel_size} does not go with engine "
            "deepspeed, whose ZeRO reduces gradients before the pipeline has all of them: set engine to megatron, or "
            "the size to 1",
        )
        check(
            parallel.world_size == 1 or parallel.world_size > parallel.tensor_model_parallel_size,
            f"engine deepspeed has nothing to share: all {parallel.world_size} ranks (WORLD_SIZE) are tensor parallel. "
            "Start more ranks, lower parallel.tensor_model_parallel_size, or set engine to megatron",
        )
        check(
            not parallel.sequence_parallel,
            "parallel.sequence_parallel does not go with engine deepspeed, which does not sum the gradients of norms "
            "over tensor parallel ranks: leave it out, or set engine to megatron",
        )
        check(
            self.layers.fp8 is None,
            f"layers.fp8 {self.layers.fp8} does not go with engine deepspeed, which takes weights away while "
            "TransformerEngine keeps FP8 copies of them: leave it unset, or set engine to megatron",
        )
        check(
            self.optim.implementation == "torch",
            f"optim.implementation {self.optim.implementation!r} does not go with engine deepspeed, whose checkpoints "
            "are read and written through torch's AdamW here: leave it at torch, or set engine to megatron",
        )
        check(
            not self.layers.loss_chunk_tokens,
            f"layers.loss_chunk_tokens {self.layers.loss_chunk_tokens} does not go with engine deepspeed, which has "
            "the weight of the output layer in its own forward pass alone: leave it unset, or set engine to megatron",
        )

    @property
    def runs_on(self) -> Literal["one_process", "megatron", "deepspeed"]:
        """The engine that computes the steps."""
        if self.engine == "auto":
            return "megatron" if self.parallel.world_size > 1 else "one_process"
        return self.engine

    @property
    def loss_chunk_tokens(self) -> int:
        """Tokens of a chunk of the loss in this run; 0 computes the loss of all tokens at once."""
        return 0 if self.runs_on == "deepspeed" else self.layers.chunk_tokens

    @property
    def num_microbatches(self) -> int:
        """Forward passes per optimizer step on each data parallel rank."""
        return self.data.global_batch_size // (self.data.micro_batch_size * self.parallel.data_parallel_size)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from nested mappings; unknown, missing and mistyped keys raise ConfigError."""
        return dataclass_from_mapping(cls, values, where="config")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values that `from_dict` reads back."""
        return dataclasses.asdict(self)


def check_sequence_length(data: DataConfig, model: ModelConfig, setting: str = "data.seq_length") -> None:
    """Raise ConfigError if the packed rows are longer than the model allows; `setting`: what the user calls theirs."""
    check(
        data.seq_length <= model.max_sequence_length,
        f"{setting} ({data.seq_length}) must not exceed the model's max_sequence_length ({model.max_sequence_length})",
    )
