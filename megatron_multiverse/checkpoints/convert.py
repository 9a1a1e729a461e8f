"""What tools/convert_checkpoint.py runs: any source to any target, one tensor at a time.

The output is written to `SAVE.partial`, unit by unit; each finished unit is flushed and noted. When all are done the
folder is renamed to `SAVE`. So a run that is killed goes on with the first unfinished unit, and nothing half-written
ever stands under the target's name. Threads read (and check) the next tensors while the last one is written, another
flushes a finished unit while the next one is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import megatron_multiverse
from megatron_multiverse.checkpoints.control_tokens import ControlTokenSource, tokenizer_folder
from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.checkpoints.formats.hf import HFTarget
from megatron_multiverse.checkpoints.formats.hf_assets import (
    asset_files,
    check_rows,
    check_tags,
    copy_assets,
    save_tokenizer,
    tag_ids,
    write_generation_config,
    write_model_card,
)
from megatron_multiverse.checkpoints.formats.legacy import LegacyTarget
from megatron_multiverse.checkpoints.formats.raw import check_finite, check_range
from megatron_multiverse.checkpoints.formats.torch_dist import TorchDistTarget
from megatron_multiverse.checkpoints.manifest import Manifest
from megatron_multiverse.checkpoints.names.rules import check_divisible
from megatron_multiverse.checkpoints.names.table import Entry
from megatron_multiverse.checkpoints.protocols import Source, Stream, Target, target_dtype
from megatron_multiverse.checkpoints.recycled import recycling
from megatron_multiverse.checkpoints.run_files import (
    MODEL_CONFIG_FILE,
    POINTER_FILE,
    RECORD_FILE,
    RELEASE,
    trained_steps,
)
from megatron_multiverse.checkpoints.sources import open_checkpoint
from megatron_multiverse.checksums import checksum, is_checked, write_checksums
from megatron_multiverse.config import pad_vocab_size
from megatron_multiverse.errors import CheckpointError, ConfigError
from megatron_multiverse.files import flush
from megatron_multiverse.progress import ProgressLine

logger = logging.getLogger(__name__)

_READERS = 2
"""Threads that read: while one waits for the disk the other checks what it has read."""
_HELD_ELEMENTS = 1 << 27
"""Elements of the tensor that is written and of those read ahead of it; one is always read ahead, however large."""


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did."""

    folder: Path
    num_bytes: int
    """Size of the weights written, earlier runs included."""
    resumed_bytes: int
    """The part of it that an earlier run wrote."""
    units: int
    """Units (files, or pipeline stages) in all."""
    resumed_units: int
    """Units that an earlier run had finished."""
    seconds: float


def convert_checkpoint(config: ConvertConfig) -> ConvertResult:
    """Convert a checkpoint.

    Raises:
        ConfigError: an option does not fit the model, the model is not supported, or the disk is too small.
        CheckpointError: the input is damaged or incomplete, or a file cannot be read or written; nothing stands under
            the output's name.
    """
    try:
        with recycling():
            return _convert(config)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or config.save}: {error.strerror or error}. Free space or correct the rights, then run "
            f"the same command again: finished files are kept in {config.save}.partial"
        ) from error


def _convert(config: ConvertConfig) -> ConvertResult:
    started = time.perf_counter()
    save = Path(config.save)
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise CheckpointError(f"{save} already exists: choose another --save or remove it")
    source = open_source(config)
    check_tokenizer(config, source)
    padded = padded_vocab_size(config, source)
    target = open_target(config, source, padded)
    unfinished = save.with_name(save.name + ".partial")
    with Manifest(unfinished, fingerprint(config, source)) as manifest:
        weights = unfinished if config.to == "hf" else unfinished / RELEASE
        resumed = sum(unit.name in manifest.finished for unit in target.units)
        if resumed:
            logger.info("continuing in %s: %d of %d units are finished", unfinished, resumed, len(target.units))
        resumed_bytes = manifest.finished_bytes()
        check_disk_space(unfinished, target.total_bytes - resumed_bytes)
        _write_units(config, source, target, manifest, weights)
        _finish(config, source, target, manifest, weights, padded)
        for path in unfinished.rglob("*"):
            flush(path)
        if save.exists():
            save.rmdir()
        # The manifest goes last: without it nothing shows that SAVE.partial is an unfinished conversion.
        manifest.move(save)
    return ConvertResult(
        save, manifest.finished_bytes(), resumed_bytes, len(target.units), resumed, time.perf_counter() - started
    )


def open_source(config: ConvertConfig) -> Source:
    """The input, with the rows of the tags if they are to be added."""
    source = open_checkpoint(
        config.load,
        side=config.from_,
        family=config.family,
        model_config=config.model_config,
        vocab_size=config.vocab_size,
        trust_pickle=config.trust_pickle,
    )
    if config.add_control_tokens:
        return ControlTokenSource(source, config.tokenizer_model, config.tag_rows)
    return source


def check_tokenizer(config: ConvertConfig, source: Source) -> None:
    """Hold the tokenizer that will be written against the weights, before any is read.

    Raises:
        ConfigError: `--tokenizer-model` has no tokenizer.
        CheckpointError: the tokenizer has more ids than the vocabulary has rows.
    """
    folder = tokenizer_folder(source, config.tokenizer_model)
    if folder is None:
        if config.to == "hf":
            logger.warning("%s has no tokenizer: none is exported; --tokenizer-model names one", source.folder)
        return
    check_rows(folder, source.config.vocab_size)
    if source.trained and not config.add_control_tokens and not tag_ids(folder):
        logger.warning(
            "%s comes from training, the tokenizer in %s has no structure tags: if the model was trained with them, "
            "--add-control-tokens adds them to the tokenizer and keeps the trained rows",
            source.folder, folder,
        )  # fmt: skip


def padded_vocab_size(config: ConvertConfig, source: Source) -> int:
    """Rows of the vocabulary matrices of the output."""
    if config.to == "hf":
        return source.config.vocab_size
    multiple = config.make_vocab_size_divisible_by * config.tensor_model_parallel_size
    return pad_vocab_size(source.config.vocab_size, multiple)


def open_target(config: ConvertConfig, source: Source, padded: int) -> Target:
    """The output and its units; nothing is written yet."""
    shard_size = int(config.shard_size * 1e9)
    if config.to == "hf":
        return HFTarget(source, config.dtype, shard_size)
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    check_divisible(dataclasses.replace(source.config, vocab_size=padded), tp, pp)
    if config.ckpt_format == "torch_dist":
        return TorchDistTarget(source, config.dtype, shard_size, tp=tp, pp=pp, padded_vocab_size=padded)
    return LegacyTarget(
        source, config.dtype, tp=tp, pp=pp, padded_vocab_size=padded, transformer_impl=config.transformer_impl
    )


def fingerprint(config: ConvertConfig, source: Source) -> dict[str, Any]:
    """Everything that the output depends on: options, version, weights by size and time of change, the small files
    that were read by their content."""
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("save", "trust_pickle")}
    files = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in source.files}
    assets = asset_files(tokenizer_folder(source, config.tokenizer_model), source.asset_folders)
    small = {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in [*source.described_by, *assets.values()]
    }
    return {"version": megatron_multiverse.__version__, "options": options, "files": files, "small_files": small}


def check_disk_space(folder: Path, needed: int) -> None:
    """Raise ConfigError unless `needed` bytes (and a little) are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if needed * 1.01 > free:
        raise ConfigError(
            f"{folder} needs {needed / 1e9:.4g} GB more, the disk has {free / 1e9:.4g} GB free: "
            "free some space or save elsewhere"
        )


def _write_units(config: ConvertConfig, source: Source, target: Target, manifest: Manifest, weights: Path) -> None:
    weights.mkdir(exist_ok=True)
    prefix = "" if weights == manifest.folder else f"{RELEASE}/"
    line = ProgressLine("convert", target.total_bytes, done=manifest.finished_bytes())
    with line, ThreadPoolExecutor(_READERS) as readers, ThreadPoolExecutor(1) as flusher:
        flushed: Future[None] | None = None
        for unit in target.units:
            if unit.name in manifest.finished:
                continue
            read = partial(_checked_read, config, source)
            record = target.write(unit, _counted(line, prefetched(unit.entries, read, readers)), weights)
            named = {
                key: {prefix + name: value for name, value in record[key].items()}
                for key in ("files", "checksums")
                if key in record
            }
            if flushed is not None:
                flushed.result()
            flushed = flusher.submit(manifest.add, unit.name, record | named)
        if flushed is not None:
            flushed.result()


def _counted(line: ProgressLine, tensors: Stream) -> Iterator[tuple[Entry, Tensor]]:
    """The same stream; a tensor counts as done when the caller asks for the next one."""
    for entry, tensor in tensors:
        size = tensor.nbytes
        yield entry, tensor
        del tensor  # or it would live until the next one is there
        line.show(line.done + size)


def _checked_read(config: ConvertConfig, source: Source, entry: Entry) -> Tensor:
    tensor = source.read(entry)
    if not config.allow_non_finite:
        check_finite(tensor, file=source.where(entry), name=_name(config, entry))
        dtype = target_dtype(source, entry, config.dtype)
        check_range(tensor, dtype, file=source.where(entry), name=_name(config, entry))
    return tensor


def _name(config: ConvertConfig, entry: Entry) -> str:
    """A tensor by the name it has in the input."""
    return " or ".join(name for name, _ in entry.hf) if config.from_ == "hf" else entry.mcore


def prefetched(entries: Iterable[Entry], read: Any, pool: ThreadPoolExecutor) -> Iterator[tuple[Entry, Tensor]]:
    """Entries with their tensors; the next ones are read while the caller works on the last."""
    waiting = deque(entries)
    ahead: deque[tuple[Entry, Future[Tensor]]] = deque()
    held = 0
    while waiting or ahead:
        while waiting and (len(ahead) < 2 or held + math.prod(waiting[0].shape) <= _HELD_ELEMENTS):
            entry = waiting.popleft()
            held += math.prod(entry.shape)
            ahead.append((entry, pool.submit(read, entry)))
        entry, future = ahead.popleft()
        tensor = future.result()
        del future  # it holds the tensor, too
        yield entry, tensor
        del tensor  # or it would live until the next one is there
        held -= math.prod(entry.shape)


def _finish(
    config: ConvertConfig, source: Source, target: Target, manifest: Manifest, weights: Path, padded: int
) -> None:
    """Write everything but the weights; the folder is complete then."""
    folder = manifest.folder
    target.finish([manifest.finished[unit.name] for unit in target.units], weights)
    _write_checksums(manifest, weights)
    copy_assets(tokenizer_folder(source, config.tokenizer_model), source.asset_folders, folder)
    record = conversion_record(config, source, padded)
    if isinstance(source, ControlTokenSource):
        save_tokenizer(source.tokenizer, folder)
    if config.to == "hf":
        write_generation_config(folder)
        provenance = {k: record[k] for k in ("source", "source_kind", "training_step", "control_tokens")}
        write_model_card(folder, Path(config.save).name, source.config, source.family.architecture, provenance)
        if ids := (source.plan.tag_ids if isinstance(source, ControlTokenSource) else tag_ids(folder)):
            check_tags(folder, ids)
    else:
        dataclasses.replace(source.config, vocab_size=padded).to_json(folder / MODEL_CONFIG_FILE)
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (folder / POINTER_FILE).write_text(f"{RELEASE}\n", encoding="utf-8")


def _write_checksums(manifest: Manifest, weights: Path) -> None:
    """Checksums of what the units wrote, and of the small files that say where in there each tensor lies."""
    known = {str((manifest.folder / name).relative_to(weights)): value for name, value in manifest.checksums().items()}
    small = {f.name: checksum(f) for f in weights.iterdir() if is_checked(f) and f.name not in known}
    write_checksums(weights, known | small)


def conversion_record(config: ConvertConfig, source: Source, padded: int) -> dict[str, Any]:
    """Where a checkpoint came from, and what the way back needs (conversion.json)."""
    # Of older Megatron's format this is a folder of one rank, in that of the step.
    weights = Path(os.path.abspath(source.files[0])).parent
    steps = [step for folder in (weights, weights.parent) if (step := trained_steps(folder)) is not None]
    return {
        "converter": f"megatron-multiverse {megatron_multiverse.__version__}",
        "source": Path(config.load).resolve().name,
        "source_kind": config.from_,
        "training_step": steps[0] if steps else None,
        "family": source.family.name,
        "vocab_size": source.config.vocab_size,
        "padded_vocab_size": padded,
        "control_tokens": source.plan.record() if isinstance(source, ControlTokenSource) else None,
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "ckpt_format": config.ckpt_format,
        "model_config": dataclasses.asdict(dataclasses.replace(source.config, vocab_size=padded)),
        "hf_config": source.hf_config,
    }
