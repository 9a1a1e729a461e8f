"""Copies trained weights into the quickstart's model folder in bf16, halving the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Which weights go where."""

    source: Path
    """Folder with config.json and model.safetensors, as the trainer leaves it."""
    output: Path = Path(__file__).parent / "model"
    """Folder that also holds the tokenizer."""


def main() -> None:
    import torch

    from megatron_multiverse.cli import parse_options
    from megatron_multiverse.model.weights import load_model, save_model

    options = parse_options(ExportOptions)
    model, config = load_model(options.source)
    save_model(model, config, options.output, dtype=torch.bfloat16)
    size = (options.output / "model.safetensors").stat().st_size
    print(f"{options.output}: {config.num_parameters:,} parameters, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
