"""Small training runs on real-structure data, for any layout of ranks."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_multiverse.config import TrainConfig
from megatron_multiverse.parallel.local_ranks import run_ranks

LIMIT_S = 600.0
"""Seconds after which ranks are taken to hang: far more than they need on a busy machine, less than pytest's limit."""

STEPS = int(os.environ.get("MULTIVERSE_STEPS", "4"))
"""Length of a run; `MULTIVERSE_STEPS=20` is the thorough test."""
TOKENIZER = Path(__file__).parents[2] / "examples/quickstart/model"
MODEL: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 8, "vocab_size": 321, "max_sequence_length": 512, "add_qkv_bias": True,
    "share_embeddings_and_output_weights": True,
}  # fmt: skip
"""An odd vocabulary: two tensor parallel ranks pad it."""

_TP, _PP, _CP = (f"parallel.{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))
_SP, _VPP = "parallel.sequence_parallel", "parallel.virtual_pipeline_model_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {_TP: 2}),
    "sequence": (2, {_TP: 2, _SP: True}),
    "pipeline": (2, {_PP: 2}),
    "interleaved": (2, {_PP: 2, _VPP: 2}),
    "data": (2, {"eval_iters": 1}),
    "context": (2, {_CP: 2}),
    "context by heads": (2, {_CP: 2, "parallel.cp_comm_type": "a2a"}),
    "tensor and pipeline": (4, {_TP: 2, _SP: True, _PP: 2}),
    "context and tensor": (4, {_CP: 2, _TP: 2, _SP: True}),
}
"""Name -> ranks and settings."""


def config(data: Path, save: Path, **changes: Any) -> TrainConfig:
    """A run of STEPS steps with two microbatches each; dotted names change settings."""
    values: dict[str, Any] = {
        "model": dict(MODEL),
        "data": {
            "data_prefixes": [str(data)], "valid_prefixes": [str(data)], "tokenizer_model": str(TOKENIZER),
            "seq_length": 512, "micro_batch_size": 1, "global_batch_size": 2, "num_workers": 0, "overlong": "drop",
        },
        "checkpoint": {"save": str(save), "save_interval": 0},
        "optim": {"lr": 1e-3, "lr_warmup_iters": 1, "weight_decay": 0.1, "lr_decay_style": "constant"},
        "log": {"log_interval": 1},
        "layers": {"loss_chunk_tokens": 100},  # several chunks, the last one smaller
        "engine": "megatron", "train_iters": STEPS, "eval_iters": 2, "device": "cpu",
    }  # fmt: skip
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return TrainConfig.from_dict(values)


def train_rank(data: Path, save: Path, world_size: int, changes: Mapping[str, Any]) -> int:
    """What each rank does; returns the steps done."""
    os.environ["WORLD_SIZE"] = str(world_size)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    from megatron_multiverse.training.trainer import train

    return train(config(data, save, **changes)).step


def train_on(world_size: int, data: Path, save: Path, **changes: Any) -> dict[str, list[float]]:
    """Train on so many gloo ranks; loss, grad norm and validation loss of each step, as metrics.jsonl has them."""
    run_ranks(train_rank, world_size, data, save, world_size, changes, timeout=LIMIT_S)
    return numbers(save)


def numbers(save: Path) -> dict[str, list[float]]:
    """The columns of metrics.jsonl."""
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    trained, valid = ([row for row in rows if row["kind"] == kind] for kind in ("train", "valid"))
    names = ("loss", "grad_norm", "loss_tokens", "tflops")
    return {name: [row[name] for row in trained] for name in names[:3]} | {"valid": [row["loss"] for row in valid]}
