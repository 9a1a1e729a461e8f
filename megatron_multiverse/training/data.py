"""From the configuration to the loaders of a run, and what must hold between data, tokenizer and model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_multiverse.config import TrainConfig
from megatron_multiverse.data.loader import SFTLoader
from megatron_multiverse.data.mixture import Mixture
from megatron_multiverse.data.sft_dataset import SFTDataset, read_manifest
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.model.mcore import data_parallel_rank
from megatron_multiverse.training.start import check_start

logger = logging.getLogger(__name__)


def open_tokenizer(config: TrainConfig, vocab_size: int) -> MultiverseTokenizer:
    """The tokenizer of the data, held against the data and the model. Needs no ranks and no GPU, so it comes first.

    Args:
        config: the run.
        vocab_size: rows of the model's vocabulary.

    Raises:
        ConfigError: the model has fewer rows than the tokenizer has ids or none for its tags, or the data were made
            with another tokenizer.
        DataError: a manifest is damaged.
    """
    data = config.data
    tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    for prefix in (*data.data_prefixes, *data.plain_prefixes, *data.valid_prefixes):
        check_tokenizer(prefix, tokenizer, data.tokenizer_model)
    check_start(config, tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the model has {vocab_size} rows for the {tokenizer.vocab_size} ids of the tokenizer "
            f"({data.tokenizer_model}): raise model.vocab_size of a fresh model, or set add_control_tokens to true, "
            "which adds rows for the structure tags to the model of init_from"
        )
    return tokenizer


def build_loaders(config: TrainConfig, tokenizer: MultiverseTokenizer) -> tuple[SFTLoader, SFTLoader | None]:
    """Training loader, and validation loader if there are validation prefixes.

    Args:
        config: the run.
        tokenizer: of `open_tokenizer`.

    Raises:
        DataError: files are missing or damaged.
    """
    data = config.data
    for prefix in (*data.data_prefixes, *data.plain_prefixes, *data.valid_prefixes):
        warn_of_missing_manifest(prefix)
    train = _loader(config, (*data.data_prefixes, *data.plain_prefixes), tokenizer, mixture=data.mixture)
    log_length(config, train)
    warn_of_missing_ends(train.dataset, tokenizer.eod)
    if not data.valid_prefixes:
        return train, None
    valid = _loader(config, data.valid_prefixes, tokenizer, validates=True)
    log_validation(config, valid)
    return train, valid


def check_tokenizer(prefix: str, tokenizer: MultiverseTokenizer, tokenizer_model: str) -> None:
    """Refuse data whose manifest names another tokenizer: their ids would mean other text.

    Raises:
        ConfigError: the tokenizers differ.
        DataError: the manifest cannot be read.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return  # see `warn_of_missing_manifest`
    try:
        made_with, model = manifest["tokenizer_sha256"], manifest["tokenizer_model"]
    except KeyError as error:
        raise DataError(
            f"{prefix}_manifest.json is damaged (it has no {error}): run tools/preprocess_data.py again"
        ) from error
    if made_with != tokenizer.fingerprint():
        raise ConfigError(
            f"{prefix} was made with the tokenizer {model} ({made_with[:12]}), but data.tokenizer_model is "
            f"{tokenizer_model} ({tokenizer.fingerprint()[:12]}): name the same tokenizer, or preprocess again"
        )


def warn_of_missing_manifest(prefix: str) -> None:
    """Warn of data of which nobody wrote down the tokenizer."""
    if read_manifest(prefix) is None and Path(prefix + ".bin").is_file():  # without it the data set will say so
        logger.warning("no %s_manifest.json: cannot tell whether %s was made with this tokenizer", prefix, prefix)


def log_length(config: TrainConfig, loader: SFTLoader) -> None:
    """Say how many steps an epoch is, or all epochs of the mixture: packing decides that; train_iters has to fit."""
    epochs = max(1, len(config.data.mixture))
    rows = loader.count_packs(epochs)
    what = f"the {epochs} epochs of data.mixture are" if config.data.mixture else "an epoch is"
    logger.info(
        "%s %d rows of %d tokens, %.1f steps; train_iters is %d",
        what, rows, config.data.seq_length, rows / config.data.global_batch_size, config.train_iters,
    )  # fmt: skip


def log_validation(config: TrainConfig, loader: SFTLoader) -> None:
    """Say how much of the validation set a validation reads: `eval_iters` counts microbatches, not rows."""
    rows, asked = loader.count_packs(1), config.eval_iters * loader.packs_per_microbatch
    if asked < rows:
        what = "a validation reads %d of the %d rows of the validation set (eval_iters is %d)"
        logger.info(what, asked, rows, config.eval_iters)
    else:
        logger.info("a validation reads the whole validation set: %d rows", rows)


def warn_of_missing_ends(dataset: SFTDataset, eod: int | None, *, looked_at: int = 256) -> None:
    """Warn if no response ends with the token that ends an answer: a model that never sees it never stops.

    Args:
        dataset: the training data.
        eod: id of that token, if the tokenizer has one.
        looked_at: how many documents, evenly spread, are looked at.
    """
    step = max(1, len(dataset) // looked_at)
    if eod is not None and any(dataset.last_token(document) == eod for document in range(0, len(dataset), step)):
        return
    why = "the tokenizer names no such token" if eod is None else "preprocess with --append-eod"
    logger.warning("no response ends with an end token, so the model will not learn to end its answers: %s", why)


def _loader(
    config: TrainConfig,
    prefixes: Sequence[str],
    tokenizer: MultiverseTokenizer,
    *,
    mixture: tuple[float, ...] = (),
    validates: bool = False,
) -> SFTLoader:
    """The rows of some prefixes: for training without an end, for a validation each once, in this process."""
    data = config.data
    dataset = SFTDataset(list(prefixes), tokenizer.structure_vocab, malformed=data.malformed)
    structured = dataset.first_document(len(data.data_prefixes)) if mixture else 0
    return SFTLoader(
        dataset,
        seq_length=data.seq_length,
        micro_batch_size=data.micro_batch_size,
        pad=tokenizer.pad,
        seed=config.seed,
        data_parallel_rank=data_parallel_rank(),
        data_parallel_size=config.parallel.data_parallel_size,
        num_workers=0 if validates else data.num_workers,
        epochs=1 if validates else None,
        tail="pad" if validates else "continue",
        overlong=data.overlong,
        train_forced_tokens=data.train_forced_tokens,
        mixture=Mixture(tuple(mixture), structured, len(dataset)) if mixture else None,
    )
