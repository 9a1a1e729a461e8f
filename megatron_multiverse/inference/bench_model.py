"""A model of random weights, prompts of random words, and how fast the device copies: what measurements share."""

from __future__ import annotations

import random
import time

import torch

from megatron_multiverse.config import LayerConfig, ModelConfig
from megatron_multiverse.inference.bench_script import TEXT
from megatron_multiverse.model.gpt import build_gpt_model


def random_model(shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """A model with random weights, drawn on the device."""
    local = LayerConfig(transformer_impl="local")
    model: torch.nn.Module = build_gpt_model(shape, dtype=dtype, device=device, initialize=False, layers=local)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "layernorm" in name else weight.normal_(0, 0.02, generator=generator)
    return model


def random_prompt(length: int, shape: ModelConfig, seed: int) -> list[int]:
    """Ids of words."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(TEXT, shape.vocab_size, (length,), generator=generator).tolist()
    return ids


def prompt_lengths(shortest: int, longest: int, count: int) -> list[int]:
    """Tokens of so many prompts, evenly from the shortest to the longest, in the same mixed order each time."""
    lengths = [round(shortest + (longest - shortest) * k / max(count - 1, 1)) for k in range(count)]
    random.Random(0).shuffle(lengths)
    return lengths


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(1 << (29 if device.type == "cuda" else 24), dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def wait(device: torch.device) -> None:
    """Until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
