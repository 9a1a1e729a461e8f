"""One shard, from rows to PATH.bin/.npy/.json: read, build texts, tokenize in batches, validate, write.

Runs in worker processes. PATH.json is written last and by rename: it marks the shard as finished.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_multiverse.data.counters import Progress
from megatron_multiverse.data.indexed_writer import ShardWriter, optimal_dtype
from megatron_multiverse.data.prompts import Columns, PromptStyle, RowError, build_sample
from megatron_multiverse.data.readers import RawRow, Shard, read_rows
from megatron_multiverse.data.report import Totals
from megatron_multiverse.data.responses import ResponseReader
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.structure import TAGS, measure

_BATCH_BYTES = 1 << 20
_BATCH_ROWS = 256
_NAMED_FILES = 5


@dataclass(frozen=True)
class Recipe:
    """What turns a row into a document."""

    columns: Columns
    style: PromptStyle
    default_prompt: str
    append_eod: bool
    template_date: str
    one_sequence: bool


def process_shard(shard: Shard, path: Path, recipe: Recipe, tokenizer: MultiverseTokenizer, progress: Progress) -> None:
    """Write one shard and its report.

    Args:
        shard: what to read.
        path: output path without suffix.
        recipe: how rows become documents.
        tokenizer: shared by all shards.
        progress: told about each batch.
    """
    worker = _ShardJob(path, recipe, tokenizer)
    for batch in _batches(read_rows(shard, recipe.columns.names, recipe.default_prompt)):
        before = worker.totals.documents
        worker.add(batch)
        progress.add(sum(row.num_bytes for row in batch), worker.totals.documents - before)
    worker.close()


def _batches(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    batch: list[RawRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.num_bytes
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize_each(tokenizer: MultiverseTokenizer, texts: Sequence[str]) -> list[list[int] | RowError]:
    """Token ids of each text, or why the tokenizer cannot read it: one text does no harm to the others."""
    try:
        return list(tokenizer.tokenize_batch(texts))
    except BaseException as error:  # a panic inside a library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        if len(texts) == 1:
            return [RowError("tokenizer", f"the tokenizer cannot read the text: {error}")]
    return [result for text in texts for result in tokenize_each(tokenizer, [text])]


class _ShardJob:
    def __init__(self, path: Path, recipe: Recipe, tokenizer: MultiverseTokenizer) -> None:
        self.path = path
        self.recipe = recipe
        self.tokenizer = tokenizer
        date = datetime.date.fromisoformat(recipe.template_date)
        self.render_chat = partial(tokenizer.render_chat, date=date) if tokenizer.chat_template is not None else None
        self.control_pattern = tokenizer.control_pattern()
        self.reader = ResponseReader(tokenizer)
        size = tokenizer.vocab_size
        self.writer = ShardWriter(path, optimal_dtype(size), size, one_sequence=recipe.one_sequence)
        self.totals = Totals()
        self.rejected: list[dict[str, Any]] = []
        self.untagged: list[str] = []
        self.last_row = 0

    def add(self, batch: list[RawRow]) -> None:
        kept: list[tuple[RawRow, str, str]] = []
        for row in batch:
            self.last_row = row.row
            if row.is_blank:
                continue
            self.totals.rows += 1
            try:
                if row.error is not None:
                    raise row.error
                kept.append((row, *self._texts(row.fields)))
            except RowError as error:
                self._reject(row, error)
        encoded = tokenize_each(self.tokenizer, [text for _, prompt, response in kept for text in (prompt, response)])
        for k, (row, prompt, response) in enumerate(kept):
            try:
                self._document(row, prompt, response, encoded[2 * k], encoded[2 * k + 1])
            except RowError as error:
                self._reject(row, error)

    def _texts(self, fields: dict[str, Any]) -> tuple[str, str]:
        return build_sample(fields, self.recipe.columns, self.recipe.style, self.render_chat, self.control_pattern)

    def _document(
        self, row: RawRow, prompt: str, response: str, prompt_ids: list[int] | RowError, ids: list[int] | RowError
    ) -> None:
        if isinstance(prompt_ids, RowError):
            raise prompt_ids
        if isinstance(ids, RowError):
            raise ids
        self._count_changes((prompt, prompt_ids), (response, ids))
        read = self.reader.read(response, ids)
        with_end = read.ended or self.recipe.append_eod
        end = np.array([self.tokenizer.eod] if with_end else [], dtype=np.int64)
        self.writer.add(np.array(prompt_ids, dtype=np.int64), np.concatenate((read.ids, end)))
        self.totals.text_bytes += len(prompt.encode()) + len(response.encode())
        self.totals.ended += with_end
        if row.name and not any(tag in response for tag in TAGS):
            self.totals.untagged += 1
            self.untagged = [*self.untagged, row.name][:_NAMED_FILES]
        self.totals.add_document(len(prompt_ids), len(read.ids), measure(read.document))

    def _count_changes(self, *encoded: tuple[str, list[int]]) -> None:
        for text, ids in encoded:
            self.totals.checked_texts += bool(text)
            self.totals.changed_texts += not self.tokenizer.keeps(text, ids)

    def _reject(self, row: RawRow, error: RowError) -> None:
        self.totals.rejected[error.code] += 1
        entry = {"row": row.row, "sample": row.name, "reason": error.code, "message": str(error)}
        places = {"token_index": error.token_index, "char_index": error.char_index}
        self.rejected.append(entry | {name: value for name, value in places.items() if value is not None})

    def close(self) -> None:
        self.writer.close()
        # `add` rejects the unreadable rows of a batch before those that break the grammar.
        self.rejected.sort(key=lambda entry: entry["row"])
        report = {
            "last_row": self.last_row,
            "totals": self.totals.as_dict(),
            "rejected": self.rejected,
            "untagged": self.untagged,
        }
        write_json_atomic(self.path.with_suffix(".json"), report, indent=None)
