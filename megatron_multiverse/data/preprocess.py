"""Rows to Megatron's .bin/.idx: what tools/preprocess_data.py runs.

The input is cut into shards. Workers write finished shards into OUTPUT_PREFIX.shards/; the parent shows progress and
at the end joins them. A run that was stopped goes on with the shards that are not finished; a run with other input,
tokenizer or settings begins anew. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_multiverse.config import TokenizerType
from megatron_multiverse.data.counters import Progress
from megatron_multiverse.data.indexed_writer import join_shards, optimal_dtype
from megatron_multiverse.data.prompts import (
    TRAJECTORY_COLUMNS,
    ChatTemplate,
    PromptStyle,
    PromptSuffix,
    resolve_columns,
)
from megatron_multiverse.data.readers import Shard, Source, column_names, open_source
from megatron_multiverse.data.report import Totals
from megatron_multiverse.data.shard_worker import Recipe, process_shard
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.progress import ProgressLine

logger = logging.getLogger(__name__)

_FORMAT = 1  # change when the same input gives other bytes


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Turn rows of prompts and trajectories into Megatron's indexed data set, two sequences per document.

    Each response is checked against the grammar of parallel blocks; rows that break it are left out and listed in
    OUTPUT_PREFIX_rejected.jsonl with their position and the reason.
    """

    input: str
    """JSON Lines or Parquet file, folder of such files, folder saved by `datasets`, folder of trajectories (*.xml,
    *.txt; the prompt of NAME.xml in NAME.prompt.txt), or Hugging Face hub name."""
    output_prefix: str
    """Path of the output without suffix: PREFIX.bin, PREFIX.idx, PREFIX_manifest.json, PREFIX_rejected.jsonl."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """HuggingFaceTokenizer or SentencePieceTokenizer; both get the 12 structure tags as one token each."""
    tokenizer_model: str
    """Folder or file of the tokenizer, or Hugging Face hub name."""
    workers: int = 0
    """Worker processes; 0 takes one per available CPU core."""
    append_eod: bool = False
    """Put the end-of-document token after each response."""
    json_keys: list[str] | None = None
    """One key (response), two (prompt response) or three (question trajectory answer). Without it the columns of
    Multiverse-1K, of s1K-1.1, or prompt and response are found by name."""
    prompt: str = ""
    """Prompt of trajectory files that have no sidecar NAME.prompt.txt; empty means no prompt."""
    prompt_suffix: PromptSuffix = "auto"
    """Sentence after the prompt that asks for parallel or sequential thinking. auto: by the trajectory, for
    question columns only."""
    chat_template: ChatTemplate = "auto"
    """Wrap the prompt in the tokenizer's chat template. auto: for question columns only."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    max_rejected: int = 0
    """Exit with an error if more rows than this are rejected; all other rows are written either way."""


@dataclass(frozen=True)
class PreprocessResult:
    """What a run did."""

    totals: Totals
    seconds: float
    reused_shards: int
    too_many_rejected: bool


@dataclass(frozen=True)
class _Plan:
    """The run on disk: OUTPUT_PREFIX.shards/plan.json tells a later run whether it can go on."""

    key: str
    source: Source
    folder: Path

    def part(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def is_finished(self, number: int) -> bool:
        return self.part(number).with_suffix(".json").is_file()


def preprocess_data(config: PreprocessConfig) -> PreprocessResult:
    """Run to the end, or go on where an earlier run stopped.

    Raises:
        ConfigError: unreadable input or tokenizer, unknown columns.
        DataError: a worker died.
    """
    # Each worker is one process on one core; threads inside the tokenizer would only fight over the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = time.monotonic()
    tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model)
    source = open_source(config.input, split=config.split)
    if source.kind == "trajectories":
        columns = TRAJECTORY_COLUMNS
    else:
        columns = resolve_columns(column_names(source), config.json_keys)
    style = PromptStyle(config.chat_template, config.prompt_suffix)
    recipe = Recipe(columns, style, config.prompt, config.append_eod)
    _check_tokenizer(tokenizer, recipe)
    key = _key(source, tokenizer, recipe)
    manifest_path = Path(f"{config.output_prefix}_manifest.json")
    if (done := _finished_run(config.output_prefix, manifest_path, key)) is not None:
        logger.info("%s.bin is already made from this input; nothing to do", config.output_prefix)
        return _result(config, done, 0.0, len(source.shards))
    plan = _open_plan(Path(f"{config.output_prefix}.shards"), key, source)
    todo = [k for k in range(len(source.shards)) if not plan.is_finished(k)]
    if len(todo) < len(source.shards):
        logger.info("going on: %d of %d shards are finished", len(source.shards) - len(todo), len(source.shards))
    _run_workers(plan, todo, recipe, tokenizer, config.workers or _available_cores())
    totals = _join(plan, config, tokenizer, manifest_path)
    return _result(config, totals, time.monotonic() - started, len(source.shards) - len(todo))


def _check_tokenizer(tokenizer: MultiverseTokenizer, recipe: Recipe) -> None:
    if recipe.append_eod and tokenizer.eod is None:
        raise ConfigError("--append-eod: the tokenizer names no end token (eos_token in tokenizer_config.json)")
    is_chat = recipe.style.chat_template
    if is_chat == "always" or (is_chat == "auto" and recipe.columns.is_question and tokenizer.chat_template):
        tokenizer.render_chat("Is the template sound?")  # loads transformers once, before the workers fork


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _result(config: PreprocessConfig, totals: Totals, seconds: float, reused: int) -> PreprocessResult:
    too_many = totals.rejected.total() > config.max_rejected
    return PreprocessResult(totals, seconds, reused, too_many)


def _key(source: Source, tokenizer: MultiverseTokenizer, recipe: Recipe) -> str:
    """Hash of all that decides the output bytes."""
    shards = [asdict(shard) for shard in source.shards]
    parts = [_FORMAT, source.fingerprint, shards, tokenizer.fingerprint(), asdict(recipe)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _finished_run(output_prefix: str, manifest_path: Path, key: str) -> Totals | None:
    if not all(Path(f"{output_prefix}{suffix}").is_file() for suffix in (".bin", ".idx", "_manifest.json")):
        return None
    manifest = _read_object(manifest_path)
    if manifest.get("key") != key or "totals" not in manifest:
        return None
    totals = Totals()
    totals.merge(manifest["totals"])
    return totals


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a run wrote; {} if there is none or it is damaged, and its work is done again."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        logger.warning("%s is damaged (%s): doing its work again", path, error)
        return {}
    return value if isinstance(value, dict) else {}


def _open_plan(folder: Path, key: str, source: Source) -> _Plan:
    plan_file = folder / "plan.json"
    if folder.is_dir() and _read_object(plan_file).get("key") != key:
        logger.info("input, tokenizer or settings changed since the interrupted run: beginning anew")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(plan_file, {"key": key})
    return _Plan(key, source, folder)


# Forked workers share the parent's tokenizer and counters; tasks find them here.
_worker_state: dict[str, Any] = {}


def _init_worker(recipe: Recipe, tokenizer: MultiverseTokenizer, progress: Progress) -> None:
    _worker_state.update(recipe=recipe, tokenizer=tokenizer, progress=progress)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(shard: Shard, path: Path) -> None:
    process_shard(shard, path, **_worker_state)


def _run_workers(plan: _Plan, todo: list[int], recipe: Recipe, tokenizer: MultiverseTokenizer, workers: int) -> None:
    if not todo:
        return
    context = multiprocessing.get_context("fork")
    progress = Progress(context)
    arguments = (recipe, tokenizer, progress)
    executor = ProcessPoolExecutor(min(workers, len(todo)), context, _init_worker, arguments)
    with executor:
        futures = {executor.submit(_work, plan.source.shards[k], plan.part(k)): k for k in todo}
        waiting: set[Future[None]] = set(futures)
        # After the workers are forked: the progress bar has a thread, and a fork copies no threads.
        with ProgressLine("preprocess", sum(plan.source.shards[k].num_bytes for k in todo), items="docs") as line:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                line.show(*progress.values)
                for future in finished:
                    _check(future, plan.source.shards[futures[future]], executor)


def _check(future: Future[None], shard: Shard, executor: ProcessPoolExecutor) -> None:
    """Pass a worker's error on at once, without waiting for the other shards."""
    error = future.exception()
    if error is None:
        return
    executor.shutdown(wait=False, cancel_futures=True)
    if isinstance(error, BrokenProcessPool):
        raise DataError(
            "a worker process was killed (out of memory?); finished shards are kept: run the same command again, "
            "with fewer --workers if memory is short"
        ) from error
    raise DataError(f"{shard.path} [{shard.start}, {shard.stop}): {error}") from error


def _join(plan: _Plan, config: PreprocessConfig, tokenizer: MultiverseTokenizer, manifest_path: Path) -> Totals:
    """Join the shards into the final files. The shards are deleted last, so that a run stopped here can go on too."""
    numbers = range(len(plan.source.shards))
    manifest_path.unlink(missing_ok=True)  # it describes the files that are replaced now
    join_shards([plan.part(k) for k in numbers], config.output_prefix, optimal_dtype(tokenizer.vocab_size))
    totals = Totals()
    rejected_path = Path(f"{config.output_prefix}_rejected.jsonl")
    with open(rejected_path, "w", encoding="utf-8") as out:
        lines_before: dict[str, int] = {}
        for k in numbers:
            shard = plan.source.shards[k]
            report = json.loads(plan.part(k).with_suffix(".json").read_text(encoding="utf-8"))
            totals.merge(report["totals"])
            offset = lines_before.get(shard.path, 0) if shard.kind == "jsonl" else 0
            lines_before[shard.path] = offset + report["last_row"]
            for entry in report["rejected"]:
                entry["row"] += offset
                entry["sample"] = entry["sample"] or f"{Path(shard.path).name}:{entry['row']}"
                out.write(json.dumps(entry, ensure_ascii=False) + "\n")
    if not totals.rejected:
        rejected_path.unlink()
    manifest = {
        "key": plan.key,
        "input": config.input,
        "tokenizer_type": config.tokenizer_type,
        "tokenizer_model": config.tokenizer_model,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod if config.append_eod else None,
        "totals": totals.as_dict(),
    }
    write_json_atomic(manifest_path, manifest)
    shutil.rmtree(plan.folder)
    return totals
