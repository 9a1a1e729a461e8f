"""Rows to Megatron's .bin/.idx: what tools/preprocess_data.py runs.

The input is cut into shards. Workers write finished shards into OUTPUT_PREFIX.shards/; the parent shows progress and
at the end joins them. A run that was stopped goes on with the shards that are not finished; a run with other input,
tokenizer or settings begins anew. Files that no run of ours has written are neither deleted nor replaced. Nothing here
imports torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_multiverse.checksums import checksum, quick_checksum
from megatron_multiverse.config import TokenizerType
from megatron_multiverse.data.chat_templates import DEFAULT_DATE, parse_date, writes_date
from megatron_multiverse.data.encoders import DifferentIds, Encoder, EncoderChoice, PlainEncoder, choose_encoder
from megatron_multiverse.data.indexed_writer import SEQUENCES_PER_DOCUMENT, join_shards, optimal_dtype
from megatron_multiverse.data.prompts import (
    TRAJECTORY_COLUMNS,
    ChatTemplate,
    PromptStyle,
    PromptSuffix,
    resolve_columns,
    uses_template,
)
from megatron_multiverse.data.report import Totals
from megatron_multiverse.data.shard_worker import Recipe, sample_texts
from megatron_multiverse.data.sources import Source, column_names, open_source
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.data.work_folder import (
    OUTPUT_SUFFIXES,
    WorkFolder,
    delete_leftovers,
    has_key,
    read_object,
    refuse_foreign_outputs,
    warn_of_old_index,
)
from megatron_multiverse.data.worker_pool import run_workers
from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.files import write_json_atomic

logger = logging.getLogger(__name__)

_LOGGED_FILES, _NAMED_FILES = 10, 5
_FORMAT = 3  # change when the same input gives other bytes


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Turn rows of prompts and trajectories into Megatron's indexed data set, two sequences per document.

    Each response is checked against the grammar of parallel blocks; rows that break it are left out and listed in
    OUTPUT_PREFIX_rejected.jsonl with their position and the reason.
    """

    input: list[str] | str
    """One or several of: JSON Lines file (also .gz, .zst) or Parquet file, pattern such as 'data/*.jsonl', folder of
    such files, folder saved by `datasets`, trajectory files (*.xml, *.txt; the prompt of NAME.xml in NAME.prompt.txt)
    or a folder of them, Hugging Face hub name."""
    output_prefix: str
    """Path of the output without suffix: PREFIX.bin, PREFIX.idx, PREFIX_manifest.json, PREFIX_rejected.jsonl."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """HuggingFaceTokenizer or SentencePieceTokenizer; both get the 12 structure tags as one token each."""
    tokenizer_model: str
    """Folder or file of the tokenizer, or Hugging Face hub name."""
    workers: int = 0
    """Worker processes; 0 takes one per available CPU core."""
    append_eod: bool = False
    """Put the end-of-document token after each response that does not end with it."""
    one_sequence: bool = False
    """Write prompt and response as one sequence. Megatron-core's GPTDataset shuffles sequences and would tear them
    apart. Our own trainer needs them as two."""
    json_keys: list[str] | None = None
    """One key (response), two (prompt response) or three (question trajectory answer). Without it the columns of
    Multiverse-1K, of s1K-1.1, prompt and response, or messages are found by name."""
    prompt: str = ""
    """Prompt of trajectory files that have no sidecar NAME.prompt.txt; empty means no prompt."""
    prompt_suffix: PromptSuffix = "auto"
    """Sentence after the prompt that asks for parallel or sequential thinking. auto: by the trajectory, for
    question columns only."""
    chat_template: ChatTemplate = "auto"
    """Wrap the prompt in the tokenizer's chat template. auto: for question columns only. messages always are."""
    template_date: str = DEFAULT_DATE
    """Date that a chat template writes which would write today's; the default is the one that Llama 3.1's template
    names where it has no clock."""
    split: str | None = None
    """Split of a Hugging Face data set, or of a folder whose files are named after splits; train if not given."""
    encoder: EncoderChoice = "auto"
    """auto: gigatoken where it is installed and gives the ids of the tokenizers library; tokenizers: that library."""
    max_rejected: int = 0
    """Exit with an error if more rows than this are rejected; all other rows are written either way."""

    def __post_init__(self) -> None:
        for name in ("workers", "max_rejected"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be 0 or more")
        if Path(self.output_prefix).name in ("", "..") or self.output_prefix.endswith(("/", "/.")):
            raise ConfigError(
                f"output_prefix ({self.output_prefix!r}) must end in a name, not in a folder: "
                f"{os.path.join(self.output_prefix, 'train')} makes train.bin there"
            )
        parse_date(self.template_date)


@dataclass(frozen=True)
class PreprocessResult:
    """What a run did."""

    totals: Totals
    seconds: float
    reused_shards: int
    too_many_rejected: bool
    template: str
    """Whether prompts are wrapped in a chat template, and how they look then."""


def preprocess_data(config: PreprocessConfig) -> PreprocessResult:
    """Run to the end, or go on where an earlier run stopped.

    Raises:
        ConfigError: unreadable input or tokenizer, unknown columns.
        DataError: a worker died, files cannot be written, or files that are not ours stand where outputs belong.
    """
    # Each worker is one process on one core; threads inside the tokenizer would only fight over the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = time.monotonic()
    source = open_source(config.input, split=config.split)
    _check_places(config.output_prefix, source)
    _log_files(source)
    tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model)
    columns = TRAJECTORY_COLUMNS if source.is_trajectories else resolve_columns(column_names(source), config.json_keys)
    _check_options(config, source)
    if not source.is_trajectories:
        logger.info("columns %s", ", ".join(columns.names))
    style = PromptStyle(config.chat_template, config.prompt_suffix)
    recipe = Recipe(columns, style, config.prompt, config.append_eod, config.template_date, config.one_sequence)
    template = _check_tokenizer(tokenizer, recipe)
    key = _key(source, tokenizer, recipe)
    try:
        if (done := _finished_run(config.output_prefix, key)) is not None:
            logger.info("%s.bin is already made from this input; nothing to do", config.output_prefix)
            delete_leftovers(config.output_prefix, key)
            return _result(config, done, 0.0, len(source.shards), template)
        refuse_foreign_outputs(config.output_prefix, key)
        with WorkFolder(config.output_prefix, key) as folder:
            todo = [k for k in range(len(source.shards)) if not folder.is_finished(k)]
            reused = len(source.shards) - len(todo)
            if reused:
                logger.info("going on: %d of %d shards are finished", reused, len(source.shards))
            _write_shards(folder, source, recipe, tokenizer, config)
            totals = _join(folder, source, config, tokenizer)
        warn_of_old_index(config.output_prefix)
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or config.output_prefix}: {error.strerror or error}. Shards that are "
            "finished are kept: make room or choose another place, and run the same command again"
        ) from error
    return _result(config, totals, time.monotonic() - started, reused, template)


def _write_shards(
    folder: WorkFolder, source: Source, recipe: Recipe, tokenizer: MultiverseTokenizer, config: PreprocessConfig
) -> None:
    """Write the shards that are not finished, and again without gigatoken if it is found to be wrong."""

    def run(encoder: Encoder) -> None:
        todo = [k for k in range(len(source.shards)) if not folder.is_finished(k)]
        run_workers(folder, source.shards, todo, recipe, tokenizer, encoder, config.workers or _available_cores())

    if (why := folder.distrusted) is not None:
        logger.info("encoding with tokenizers: %s", why)
    elif config.encoder == "auto":
        encoder = choose_encoder(tokenizer, lambda: sample_texts(source.shards, recipe, tokenizer))
        try:
            return run(encoder)
        except DifferentIds as error:
            logger.warning("%s; what gigatoken has encoded is encoded again with tokenizers", error)
            folder.distrust(encoder.name, str(error))
    run(PlainEncoder(tokenizer))


def _check_places(output_prefix: str, source: Source) -> None:
    """Refuse inputs that are outputs too: they would be replaced, or be read as data the next time."""
    work_folder = Path(f"{output_prefix}.shards").resolve()
    outputs = {Path(f"{output_prefix}{suffix}").resolve() for suffix in OUTPUT_SUFFIXES}
    for part in source.inputs:
        places = {Path(part.name).resolve()} if not part.files else {file.resolve() for file in part.files}
        for place in places:
            if place in outputs or place == work_folder or work_folder in place.parents:
                raise ConfigError(f"--input {place} is where --output-prefix {output_prefix} writes: choose another")
        if part.root is not None and part.root.resolve() in next(iter(outputs)).parents and Path(part.name).is_dir():
            raise ConfigError(
                f"--output-prefix {output_prefix} lies inside of --input {part.name}, where the outputs would be read "
                "as data the next time: choose a place outside"
            )


def _log_files(source: Source) -> None:
    files = source.files
    for file in files[:_LOGGED_FILES]:
        logger.info("reading %s", file)
    if len(files) > _LOGGED_FILES:
        logger.info("... and %d more files, the last one %s", len(files) - _LOGGED_FILES, files[-1])


def _check_options(config: PreprocessConfig, source: Source) -> None:
    if config.prompt and not source.is_trajectories:
        raise ConfigError("--prompt has no effect: only trajectory files may lack a prompt of their own; leave it out")
    if config.json_keys and source.is_trajectories:
        raise ConfigError("--json-keys has no effect on trajectory files, which have no columns: leave it out")


def _check_tokenizer(tokenizer: MultiverseTokenizer, recipe: Recipe) -> str:
    """Refuse what will not work; returns what will be done with the chat template."""
    if recipe.append_eod and tokenizer.eod is None:
        named = tokenizer.special_tokens().get("eos_token")
        what = f"the end token {named!r}, which is not in its vocabulary" if named else "no end token"
        raise ConfigError(f"--append-eod: the tokenizer names {what} (eos_token in tokenizer_config.json): correct it")
    if not uses_template(recipe.style, recipe.columns):
        return "not applied (auto applies it to question columns only)"
    if recipe.columns.is_conversation and (recipe.style.chat_template == "never" or not tokenizer.chat_templates):
        lacks = (
            "--chat-template is never: leave it out"
            if tokenizer.chat_templates
            else "the tokenizer has no chat template: put one, as chat_template.jinja, into a copy of its folder that "
            "--tokenizer-model names"
        )
        raise ConfigError(
            f"the column {recipe.columns.response!r} holds conversations, which a chat template makes prompts of, but "
            f"{lacks}, or write the columns prompt and response"
        )
    if recipe.style.chat_template == "auto" and not tokenizer.chat_templates:
        return "none in this tokenizer"
    date = parse_date(recipe.template_date)
    try:
        rendered = tokenizer.render_chat("QUESTION", date=date)  # loads transformers once, before the workers fork
    except ConfigError:
        raise
    except Exception as error:  # a template is code of its author
        raise ConfigError(f"the tokenizer's chat template fails ({error}); use --chat-template never") from error
    clock = f", its date always {date}" if writes_date(tokenizer.chat_template or "") else ""
    return f"applied{clock}: {rendered!r}"


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _result(config: PreprocessConfig, totals: Totals, seconds: float, reused: int, template: str) -> PreprocessResult:
    too_many = totals.rejected.total() > config.max_rejected
    return PreprocessResult(totals, seconds, reused, too_many, template)


def _key(source: Source, tokenizer: MultiverseTokenizer, recipe: Recipe) -> str:
    """Hash of all that decides the output bytes."""
    shards = [asdict(shard) for shard in source.shards]
    parts = [_FORMAT, source.fingerprint, shards, tokenizer.fingerprint(), asdict(recipe)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _finished_run(output_prefix: str, key: str) -> Totals | None:
    if not all(Path(f"{output_prefix}{suffix}").is_file() for suffix in (".bin", ".idx", "_manifest.json")):
        return None
    manifest = read_object(Path(f"{output_prefix}_manifest.json"))
    if not has_key(manifest) or manifest["key"] != key or "totals" not in manifest:
        return None
    for suffix, recorded in manifest.get("files", {}).items():
        if checksum(Path(f"{output_prefix}{suffix}")) != recorded["checksum"]:
            logger.warning("%s%s is not what was written there: making it again", output_prefix, suffix)
            return None
    totals = Totals()
    totals.merge(manifest["totals"])
    return totals


def _join(folder: WorkFolder, source: Source, config: PreprocessConfig, tokenizer: MultiverseTokenizer) -> Totals:
    """Join the shards into the final files. The shards are deleted last, so that a run stopped here can go on too."""
    manifest_path = Path(f"{config.output_prefix}_manifest.json")
    manifest_path.unlink(missing_ok=True)  # it describes the files that are replaced now
    sequences = 1 if config.one_sequence else SEQUENCES_PER_DOCUMENT
    checksums = join_shards(
        [folder.part(k) for k in range(len(source.shards))],
        config.output_prefix,
        optimal_dtype(tokenizer.vocab_size),
        work_folder=folder.path,
        sequences_per_document=sequences,
    )
    totals = _join_reports(folder, source, Path(f"{config.output_prefix}_rejected.jsonl"))
    manifest = {
        "key": folder.key,
        "input": config.input,
        "split": config.split,
        "tokenizer_type": config.tokenizer_type,
        "tokenizer_model": config.tokenizer_model,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod if config.append_eod else None,
        "sequences_per_document": sequences,
        "totals": totals.as_dict(),
        "files": {
            suffix: {"checksum": value, "quick_checksum": quick_checksum(Path(f"{config.output_prefix}{suffix}"))}
            for suffix, value in checksums.items()
        },
    }
    write_json_atomic(manifest_path, manifest)
    folder.delete()
    return totals


def _join_reports(folder: WorkFolder, source: Source, rejected_path: Path) -> Totals:
    """Sum the counts of the shards, and write their rejected rows into one file if there are any."""
    totals = Totals()
    untagged: list[str] = []
    lines_before: dict[str, int] = {}
    part = folder.path / "rejected.jsonl"
    # A message may quote half of a surrogate pair from a row; escaped, it is still JSON.
    with open(part, "w", encoding="utf-8", errors="backslashreplace") as out:
        for k, shard in enumerate(source.shards):
            report = json.loads(folder.part(k).with_suffix(".json").read_text(encoding="utf-8"))
            totals.merge(report["totals"])
            untagged += report["untagged"]
            offset = lines_before.get(shard.path, 0) if shard.kind == "jsonl" else 0
            lines_before[shard.path] = offset + report["last_row"]
            for entry in report["rejected"]:
                entry["row"] += offset
                entry["sample"] = entry["sample"] or f"{Path(shard.path).name}:{entry['row']}"
                out.write(json.dumps(entry, ensure_ascii=False) + "\n")
    if totals.rejected:
        os.replace(part, rejected_path)
    else:
        rejected_path.unlink(missing_ok=True)  # of an earlier run
    if 0 < totals.untagged < totals.documents:
        some = ", ".join(untagged[:_NAMED_FILES])
        logger.warning("%d of the %d files that passed hold no tag: %s", totals.untagged, totals.documents, some)
    return totals
