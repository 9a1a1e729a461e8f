"""One shard, from rows to PATH.bin/.npy/.json: read, build texts, tokenize in batches, validate, write.

Runs in worker processes. PATH.json is written last and by rename: it marks the shard as finished.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_multiverse.data.counters import Progress
from megatron_multiverse.data.indexed_writer import ShardWriter, optimal_dtype
from megatron_multiverse.data.prompts import Columns, PromptStyle, RowError, build_sample
from megatron_multiverse.data.readers import RawRow, Shard, read_rows
from megatron_multiverse.data.report import Totals
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import StructureError
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.structure import MAX_DEPTH, measure, parse

_BATCH_BYTES = 1 << 20
_BATCH_ROWS = 256
_CHECKED_TOKENS = 1024


@dataclass(frozen=True)
class Recipe:
    """What turns a row into a document."""

    columns: Columns
    style: PromptStyle
    default_prompt: str
    append_eod: bool


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


class _ShardJob:
    def __init__(self, path: Path, recipe: Recipe, tokenizer: MultiverseTokenizer) -> None:
        self.path = path
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.render_chat = tokenizer.render_chat if tokenizer.chat_template is not None else None
        self.eod = np.array([tokenizer.eod] if recipe.append_eod else [], dtype=np.int64)
        self.writer = ShardWriter(path, optimal_dtype(tokenizer.vocab_size), tokenizer.vocab_size)
        self.totals = Totals()
        self.rejected: list[dict[str, Any]] = []
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
                kept.append((row, *build_sample(row.fields, self.recipe.columns, self.recipe.style, self.render_chat)))
            except RowError as error:
                self._reject(row, error.code, str(error), char_index=error.char_index)
        encoded = self.tokenizer.tokenize_batch([text for _, prompt, response in kept for text in (prompt, response)])
        for k, (row, prompt, response) in enumerate(kept):
            self._document(row, prompt, response, encoded[2 * k], encoded[2 * k + 1])
        if kept:
            # The start of one text per batch is enough: a tokenizer that changes texts changes most of them. The cut
            # after so many tokens may leave part of a character at the end.
            start = self.tokenizer.detokenize(encoded[1][:_CHECKED_TOKENS]).rstrip("\ufffd")
            self.totals.checked_texts += 1
            self.totals.changed_texts += not kept[0][2].startswith(start)

    def _document(self, row: RawRow, prompt: str, response: str, prompt_ids: list[int], ids: list[int]) -> None:
        array = np.array(ids, dtype=np.int64)
        try:
            document = parse(array, self.tokenizer.structure_vocab, max_depth=MAX_DEPTH)
        except StructureError as error:
            before = self.tokenizer.detokenize(ids[: error.token_index])
            message = f"found {error.found}, expected {error.expected}"
            self._reject(row, error.code, message, token_index=error.token_index, char_index=len(before))
            return
        self.writer.add(np.array(prompt_ids, dtype=np.int64), np.concatenate((array, self.eod)))
        self.totals.text_bytes += len(prompt.encode()) + len(response.encode())
        self.totals.add_document(len(prompt_ids), len(ids), measure(document))

    def _reject(self, row: RawRow, code: str, message: str, **position: int | None) -> None:
        self.totals.rejected[code] += 1
        entry = {"row": row.row, "sample": row.name, "reason": code, "message": message}
        self.rejected.append(entry | {name: value for name, value in position.items() if value is not None})

    def close(self) -> None:
        self.writer.close()
        # `add` rejects the unreadable rows of a batch before those that break the grammar.
        self.rejected.sort(key=lambda entry: entry["row"])
        report = {"last_row": self.last_row, "totals": self.totals.as_dict(), "rejected": self.rejected}
        write_json_atomic(self.path.with_suffix(".json"), report, indent=None)
