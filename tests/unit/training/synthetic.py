"""A loader of random microbatches with a position, and configs for runs of a second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_multiverse.config import TrainConfig


class SyntheticLoader:
    """Microbatch number n depends on n alone; `seen` lists the numbers handed out."""

    tag_ids = None  # the tokens are random; where they stand is told by position_ids and r alone

    def __init__(self, b: int = 2, s: int = 16, vocab_size: int = 32) -> None:
        self.b, self.s, self.vocab_size = b, s, vocab_size
        self.position = 0
        self.seen: list[int] = []

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            self.seen.append(self.position)
            batch = self.batch(self.position)
            self.position += 1
            yield batch

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, self.vocab_size, (self.b, self.s + 1), generator=generator)
        mask = torch.rand(self.b, self.s, generator=generator) < 0.2 + 0.6 * (number % 2)
        return {
            "input_ids": ids[:, :-1],
            "labels": ids[:, 1:],
            "loss_mask": mask.float(),
            "position_ids": torch.randint(0, 20, (self.b, self.s), generator=generator),
            "r": torch.stack([torch.randperm(self.s, generator=generator) for _ in range(self.b)]).int(),
        }

    def sample_name(self, sample_id: int) -> str:
        return f"sample {sample_id}"

    def sample_problem(self, sample_id: int) -> str | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def config(save: Path, **changes: Any) -> TrainConfig:
    """A tiny run of six steps with two microbatches each; dotted names change settings."""
    values: dict[str, Any] = {
        "model": {
            "num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 2,
            "num_query_groups": 1, "kv_channels": 8, "vocab_size": 32, "max_sequence_length": 16,
        },
        "data": {"data_prefixes": ["unused"], "seq_length": 16, "micro_batch_size": 2, "global_batch_size": 4},
        "checkpoint": {"save": str(save), "save_interval": 3},
        "optim": {"lr": 1e-2, "lr_warmup_iters": 2, "weight_decay": 0.1},
        "log": {"log_interval": 1},
        "train_iters": 6, "device": "cpu",
    }  # fmt: skip
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return TrainConfig.from_dict(values)
