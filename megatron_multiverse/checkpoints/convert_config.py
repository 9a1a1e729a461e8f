"""The options of a conversion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_multiverse.checkpoints.control_tokens import TagRows
from megatron_multiverse.checkpoints.formats.legacy import TransformerImpl
from megatron_multiverse.checkpoints.protocols import DTypeName, Side
from megatron_multiverse.config.strict import check_choices
from megatron_multiverse.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert a checkpoint between Hugging Face and megatron-core, on a CPU."""

    from_: Side
    """Kind of the input: hf (safetensors and config.json), or mcore (torch_dist, mp_rank_XX or a model folder)."""
    to: Side
    """Kind of the output. The same kind again rewrites it for other parallel sizes, another dtype or vocabulary."""
    load: str
    """Input folder."""
    save: str
    """Output folder; must not exist. A run that was interrupted continues in SAVE.partial."""
    tensor_model_parallel_size: int = 1
    """Ranks that each matrix is cut for (mcore; torch_dist can still be loaded at any other size)."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are divided into (mcore; matters for --ckpt-format torch only)."""
    ckpt_format: Literal["torch_dist", "torch"] = "torch_dist"
    """Format of mcore output: torch_dist, or torch for older Megatron (mp_rank_XX files)."""
    transformer_impl: TransformerImpl = "transformer_engine"
    """Whose parameter names --ckpt-format torch writes; torch_dist has one naming for both."""
    make_vocab_size_divisible_by: int = 1
    """Pad the vocabulary (mcore) to a multiple of this times the tensor parallel size, as Megatron does."""
    vocab_size: int | None = None
    """Real rows of an mcore input's vocabulary, if it does not say; further rows are padding and dropped."""
    dtype: DTypeName = "keep"
    """Dtype of the output: keep, float32, bf16 or float16."""
    family: str | None = None
    """Architecture, one of those in checkpoints/names/ (qwen2, qwen3, llama); needed only for mcore input that was not
    converted from hf and fits several."""
    model_config: str | None = None
    """Shape of an mcore input that does not carry it: a model_config.json, a config.json or a folder with one."""
    add_control_tokens: bool = False
    """Add the twelve structure tags to tokenizer and vocabulary."""
    tag_rows: TagRows = "auto"
    """Rows that the vocabulary has already where added tags go: mean initialises them, keep leaves them, but for rows
    of zeros; auto keeps them in weights that come from training, which may have trained them."""
    tokenizer_model: str | None = None
    """Folder of the tokenizer, if it is not in the input folder (or, for the folder of a run, in its model folder)."""
    shard_size: float = 2.0
    """Largest output file in GB (1e9 bytes); an interrupted run may have to write that much again."""
    trust_pickle: bool = False
    """Load pickles without restrictions. They can run any code: only for files you wrote yourself."""
    allow_non_finite: bool = False
    """Convert tensors with NaN or infinite values too, instead of stopping."""

    def __post_init__(self) -> None:
        check_choices(self, "")
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "make_vocab_size_divisible_by"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.shard_size <= 0:
            raise ConfigError(f"shard_size must be positive, got {self.shard_size}")
        _refuse_idle_options(self)
        if Path(self.load).resolve() == Path(self.save).resolve():
            raise ConfigError(f"load and save are the same folder ({self.load})")


def _refuse_idle_options(config: ConvertConfig) -> None:
    """Raise ConfigError for an option that is set and would do nothing."""
    legacy = config.to == "mcore" and config.ckpt_format == "torch"
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "make_vocab_size_divisible_by")
    idle = dict.fromkeys((*sizes, "ckpt_format"), (config.to == "hf", "with --to hf")) | {
        "transformer_impl": (not legacy, "but with --to mcore --ckpt-format torch"),
        "shard_size": (legacy, "with --ckpt-format torch"),
        "tag_rows": (not config.add_control_tokens, "without --add-control-tokens"),
        "trust_pickle": (config.from_ == "hf", "with --from hf"),
    }
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, (nothing, why) in idle.items():
        if nothing and (value := getattr(config, name)) != defaults[name]:
            raise ConfigError(f"--{name.replace('_', '-')} {value} has no effect {why}: leave it out")
