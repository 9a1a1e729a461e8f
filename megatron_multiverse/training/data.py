"""From DataConfig to the loaders of a run. Nothing else in training/ imports the data package."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_multiverse.config import DataConfig
from megatron_multiverse.data.loader import SFTLoader
from megatron_multiverse.data.sft_dataset import SFTDataset
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def build_loaders(config: DataConfig, seed: int, vocab_size: int) -> tuple[SFTLoader, SFTLoader | None]:
    """Training loader, and validation loader if there are validation prefixes.

    Raises:
        ConfigError: the model has fewer rows than the tokenizer has ids, or the data were made with another tokenizer.
        DataError: files are missing or damaged.
    """
    tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model)
    for prefix in (*config.data_prefixes, *config.valid_prefixes):
        check_tokenizer(prefix, tokenizer, config.tokenizer_model)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size ({vocab_size}) is below the tokenizer's ({tokenizer.vocab_size}, "
            f"{config.tokenizer_model}): raise it, or add the tags to a saved model with "
            "tools/convert_checkpoint.py --add-control-tokens"
        )
    valid = config.valid_prefixes
    return (
        _loader(config, config.data_prefixes, tokenizer, seed, config.num_workers),
        _loader(config, valid, tokenizer, seed, num_workers=0) if valid else None,
    )


def check_tokenizer(prefix: str, tokenizer: MultiverseTokenizer, tokenizer_model: str) -> None:
    """Refuse data whose manifest names another tokenizer: their ids would mean other text.

    Raises:
        ConfigError: the tokenizers differ.
        DataError: the manifest cannot be read.
    """
    manifest_path = Path(f"{prefix}_manifest.json")
    if not manifest_path.is_file():
        logger.warning("no %s: cannot tell whether %s was made with this tokenizer", manifest_path, prefix)
        return
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        made_with, model = manifest["tokenizer_sha256"], manifest["tokenizer_model"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest_path} is damaged ({error!r}); run tools/preprocess_data.py again") from error
    if made_with != tokenizer.fingerprint():
        raise ConfigError(
            f"{prefix} was made with the tokenizer {model} ({made_with[:12]}), but data.tokenizer_model is "
            f"{tokenizer_model} ({tokenizer.fingerprint()[:12]}): name the same tokenizer, or preprocess again"
        )


def _loader(
    config: DataConfig, prefixes: Sequence[str], tokenizer: MultiverseTokenizer, seed: int, num_workers: int
) -> SFTLoader:
    return SFTLoader(
        SFTDataset(list(prefixes), tokenizer.structure_vocab, malformed=config.malformed),
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        pad=tokenizer.pad,
        seed=seed,
        num_workers=num_workers,
        tail="cycle",
        overlong=config.overlong,
        train_forced_tokens=config.train_forced_tokens,
    )
