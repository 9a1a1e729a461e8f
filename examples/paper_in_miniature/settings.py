"""What is trained and measured: the runs, and the two sizes of everything."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from training_rows import MiniLoader, RowConfig, RowMaker

from megatron_multiverse.checkout import commit_here
from megatron_multiverse.config import (
    CheckpointConfig,
    DataConfig,
    LayerConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.model.device import choose_device, device_name

TOKENIZER = Path(__file__).parents[1] / "quickstart" / "model"
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a miniature is."""

    model: ModelConfig
    seq_length: int
    rows: int
    """Packed rows of a step."""
    train_iters: int
    tokens_per_s: float
    """Of a training run, for the estimate of its time: of one of four at once on an H200, and of one on a CPU core."""
    lr: float
    dtype: str
    problems: int
    """Of each set of the evaluation."""
    timed_chains: tuple[int, ...]
    """Of the problems whose wall clock is measured."""
    latency_problems: int
    """Of each set that is answered one problem at a time."""
    batches: tuple[int, ...]
    """Answers at once."""
    max_tokens: int
    """Of an answer, all branches together. Each level of nesting halves what a path may write. What stops a model that
    does not end is the length of the right answer, see `answers.Answerer.request`."""


def _model(layers: int, hidden: int, ffn: int, heads: int, groups: int, channels: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=channels,
        vocab_size=320,  # 296 tokens, padded to a multiple of 64
        max_sequence_length=8192,
        rotary_base=10000.0,
        qk_layernorm=True,  # this and untied embeddings: looking up is learned much sooner, see README.md
        share_embeddings_and_output_weights=False,
    )


FULL = Size(
    model=_model(6, 512, 1408, 8, 8, 64),
    seq_length=4096,
    rows=8,
    train_iters=2600,
    tokens_per_s=232_000,
    lr=1e-3,
    dtype="bf16",
    problems=32,
    timed_chains=(2, 3, 4, 6, 8),
    latency_problems=6,
    batches=(1, 2, 4, 8, 16, 32, 64, 128),
    max_tokens=16000,
)
SMOKE = Size(
    model=_model(2, 64, 128, 2, 1, 32),
    seq_length=1024,
    rows=2,
    train_iters=10,
    tokens_per_s=4_000,
    lr=2e-3,
    dtype="float32",
    problems=2,
    timed_chains=(2, 4),
    latency_problems=1,
    batches=(1, 2),
    max_tokens=96,
)


def runs() -> dict[str, RowConfig]:
    """Every run by name, the most telling first: the three kinds with the first seed, what carries a model beyond its
    training taken away part by part, the other seeds, and other ablations."""
    found = {f"{kind}-0": RowConfig(kind=kind) for kind in ("multiverse", "plain", "tagged")}
    found["multiverse-1"] = RowConfig(kind="multiverse", seed=1)
    found["unlabelled-lists"] = RowConfig(kind="multiverse", labelled_lists=False)
    found["no-links"] = RowConfig(kind="multiverse", links=False)
    found["fixed-labels"] = RowConfig(kind="multiverse", random_labels=False)
    found["no-position-gaps"] = RowConfig(kind="multiverse", position_gaps=False)
    found["looks-back"] = RowConfig(kind="multiverse", copies_rest=False)
    found["no-label-gaps"] = RowConfig(kind="multiverse", label_gaps=False)
    found["no-long-lists"] = RowConfig(kind="multiverse", long_lists=False)
    for seed in SEEDS[1:]:
        found |= {f"{kind}-{seed}": RowConfig(kind=kind, seed=seed) for kind in ("multiverse", "plain", "tagged")}
    found["forced-loss"] = RowConfig(kind="multiverse", train_forced_tokens=True)
    found["official-positions"] = RowConfig(kind="multiverse", official_positions=True)
    found["official-mask"] = RowConfig(kind="multiverse", official_mask=True)
    found["mixture"] = RowConfig(kind="multiverse", mixture_batches=FULL.train_iters)
    for seed in SEEDS[:2]:
        found[f"given-values-{seed}"] = RowConfig(kind="multiverse", given_values=True, seed=seed)
        linked = RowConfig(kind="multiverse", given_values=True, back_links=True, seed=seed)
        found |= {f"back-links-{seed}": linked, f"low-trees-{seed}": replace(linked, low_trees=True)}
    for kind in ("plain", "tagged"):
        found[f"{kind}-back-links-0"] = RowConfig(kind=kind, given_values=True, back_links=True)
    found["no-spare-definitions"] = RowConfig(kind="multiverse", spare_definitions=False)
    found["no-first-batches"] = RowConfig(kind="multiverse", first_batches=0)
    return found


def tokenizer() -> MultiverseTokenizer:
    """The quickstart's: digits, the words of the calculations, the tags, and bytes."""
    return build_tokenizer("HuggingFaceTokenizer", str(TOKENIZER))


def training(
    size: Size, rows: RowConfig, folder: Path, num_workers: int, attention_backend: str = "auto"
) -> tuple[TrainConfig, MiniLoader]:
    """Configuration and data of one run; all kinds take the same number of steps over rows of the same length."""
    config = TrainConfig(
        model=size.model,
        data=DataConfig(
            data_prefixes=("rows made while the model trains",),
            tokenizer_model=str(TOKENIZER),
            seq_length=size.seq_length,
            micro_batch_size=size.rows,
            global_batch_size=size.rows,
            train_forced_tokens=rows.train_forced_tokens,
        ),
        optim=OptimConfig(
            lr=size.lr,
            min_lr=size.lr / 50,
            lr_warmup_iters=size.train_iters // 20 + 1,
            weight_decay=0.05,
        ),
        layers=LayerConfig(attention_backend=attention_backend, transformer_impl="local"),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(save=str(folder), save_interval=0),
        log=LogConfig(log_interval=max(1, size.train_iters // 40)),
        train_iters=size.train_iters,
        seed=1000 + rows.seed,
        dtype=size.dtype,  # type: ignore[arg-type]
    )
    maker = RowMaker(rows, tokenizer())
    loader = MiniLoader(maker, seq_length=size.seq_length, micro_batch_size=size.rows, num_workers=num_workers)
    return config, loader


def measured_on() -> dict[str, str | None]:
    """What a result was measured on: device, version of torch, date, and the commit, None outside of a git checkout."""
    return {
        "device": device_name(choose_device("auto")),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit_here(),
    }
