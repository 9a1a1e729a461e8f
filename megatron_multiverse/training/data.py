"""From DataConfig to the loaders of a run; the training side's only look at the data package."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_multiverse.config import DataConfig
from megatron_multiverse.data.loader import SFTLoader
from megatron_multiverse.data.sft_dataset import SFTDataset
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.errors import ConfigError


def build_loaders(config: DataConfig, seed: int, vocab_size: int) -> tuple[SFTLoader, SFTLoader | None]:
    """Training loader, and validation loader if there are validation prefixes.

    Raises:
        ConfigError: the model has fewer rows than the tokenizer has ids.
    """
    tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size ({vocab_size}) is below the tokenizer's ({tokenizer.vocab_size}, "
            f"{config.tokenizer_model}): raise it, or grow the saved model (model/vocab.py)"
        )
    valid = config.valid_prefixes
    return (
        _loader(config, config.data_prefixes, tokenizer, seed, config.num_workers),
        _loader(config, valid, tokenizer, seed, num_workers=0) if valid else None,
    )


def _loader(
    config: DataConfig, prefixes: Sequence[str], tokenizer: MultiverseTokenizer, seed: int, num_workers: int
) -> SFTLoader:
    return SFTLoader(
        SFTDataset(list(prefixes), tokenizer.structure_vocab),
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        pad=tokenizer.pad,
        seed=seed,
        num_workers=num_workers,
        tail="cycle",
        overlong=config.overlong,
        train_forced_tokens=config.train_forced_tokens,
    )
