"""One shard, from rows to PATH.bin/.npy/.json: read, build texts, tokenize in batches, validate, write.

Runs in worker processes. PATH.json is written last and by rename: it marks the shard as finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from megatron_multiverse.data.chat_templates import parse_date
from megatron_multiverse.data.counters import Progress
from megatron_multiverse.data.encoders import DifferentIds, Encoder, IdArray
from megatron_multiverse.data.indexed_writer import ShardWriter, optimal_dtype
from megatron_multiverse.data.prompts import Columns, PromptStyle, build_sample
from megatron_multiverse.data.readers import RawRow, Shard, read_rows
from megatron_multiverse.data.report import Totals
from megatron_multiverse.data.responses import Response, ResponseReader
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.data.turns import RowError
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.structure import TAGS

_BATCH_BYTES = 1 << 20
_BATCH_ROWS = 256
_NAMED_FILES = 5
_SAMPLED_SHARDS, _SAMPLED_ROWS, _SAMPLED_CHARACTERS = 16, 1, 4096

_RowTexts = tuple[RawRow, str, str]  # the row, its prompt and its response


@dataclass(frozen=True)
class Recipe:
    """What turns a row into a document."""

    columns: Columns
    style: PromptStyle
    default_prompt: str
    append_eod: bool
    template_date: str
    one_sequence: bool


def process_shard(
    shard: Shard, path: Path, recipe: Recipe, tokenizer: MultiverseTokenizer, encoder: Encoder, progress: Progress
) -> None:
    """Write one shard and its report.

    Args:
        shard: what to read.
        path: output path without suffix.
        recipe: how rows become documents.
        tokenizer: shared by all shards.
        encoder: makes the ids, which are those of the tokenizer.
        progress: told about each batch.

    Raises:
        DifferentIds: the encoder was found to give other ids than the tokenizer; the shard stays unfinished.
    """
    worker = _ShardJob(path, recipe, tokenizer, encoder)
    for batch in _batches(read_rows(shard, recipe.columns.read, recipe.default_prompt)):
        before = worker.totals.documents
        worker.add(batch)
        progress.add(sum(row.num_bytes for row in batch), worker.totals.documents - before)
    worker.close()


def sample_texts(shards: Sequence[Shard], recipe: Recipe, tokenizer: MultiverseTokenizer) -> list[str]:
    """Texts of the first rows of some shards, each cut to a moderate length."""
    write_texts = TextWriter(recipe, tokenizer)
    texts: list[str] = []
    for shard in shards[:: -(-len(shards) // _SAMPLED_SHARDS)]:
        for row in islice(read_rows(shard, recipe.columns.read, recipe.default_prompt), _SAMPLED_ROWS):
            try:
                texts += write_texts(row)
            except RowError:
                continue  # it will be reported when its turn comes
    return [text[:_SAMPLED_CHARACTERS] for text in texts]


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


class TextWriter:
    """Turns a row as read into the texts of prompt and response."""

    def __init__(self, recipe: Recipe, tokenizer: MultiverseTokenizer) -> None:
        date = parse_date(recipe.template_date)
        self._render_chat = partial(tokenizer.render_chat, date=date) if tokenizer.chat_template is not None else None
        self._control_tokens = tokenizer.control_pattern()
        self._recipe = recipe

    def __call__(self, row: RawRow) -> tuple[str, str]:
        """Prompt and response.

        Raises:
            RowError: the row cannot become a sample.
        """
        if row.error is not None:
            raise row.error
        recipe = self._recipe
        return build_sample(row.fields, recipe.columns, recipe.style, self._render_chat, self._control_tokens)


def encode_each(encoder: Encoder, texts: Sequence[str]) -> list[IdArray | RowError]:
    """Token ids of each text, or why the tokenizer cannot read it: one text does no harm to the others."""
    try:
        return list(encoder.encode(texts))
    except BaseException as error:  # a panic inside a library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, DifferentIds)):
            raise
        if len(texts) == 1:
            return [RowError("tokenizer", f"the tokenizer cannot read the text: {error}")]
    return [result for text in texts for result in encode_each(encoder, [text])]


class _ShardJob:
    def __init__(self, path: Path, recipe: Recipe, tokenizer: MultiverseTokenizer, encoder: Encoder) -> None:
        self.path = path
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.write_texts = TextWriter(recipe, tokenizer)
        self.reader = ResponseReader(tokenizer)
        size = tokenizer.vocab_size
        self.writer = ShardWriter(path, optimal_dtype(size), size, one_sequence=recipe.one_sequence)
        self.totals = Totals()
        self.rejected: list[dict[str, Any]] = []
        self.untagged: list[str] = []
        self.last_row = 0

    def add(self, batch: list[RawRow]) -> None:
        texts: list[_RowTexts] = []
        for row in batch:
            self.last_row = row.row
            if row.is_blank:
                continue
            self.totals.rows += 1
            try:
                texts.append((row, *self.write_texts(row)))
            except RowError as error:
                self._reject(row, error)
        encoded = encode_each(self.encoder, [text for _, prompt, response in texts for text in (prompt, response)])
        kept: list[tuple[_RowTexts, IdArray, IdArray]] = []
        for row_texts, prompt_ids, ids in zip(texts, encoded[::2], encoded[1::2], strict=True):
            if isinstance(prompt_ids, RowError):
                self._reject(row_texts[0], prompt_ids)
            elif isinstance(ids, RowError):
                self._reject(row_texts[0], ids)
            else:
                kept.append((row_texts, prompt_ids, ids))
        responses = self.reader.read_batch([texts[2] for texts, _, _ in kept], [ids for _, _, ids in kept])
        documents = []
        for (row_texts, prompt_ids, ids), response in zip(kept, responses, strict=True):
            self._count_changes((row_texts[1], prompt_ids), (row_texts[2], ids))
            if isinstance(response, RowError):
                self._reject(row_texts[0], response)
            else:
                documents.append(self._document(*row_texts, prompt_ids, response))
        self.writer.add(documents)

    def _document(
        self, row: RawRow, prompt: str, text: str, prompt_ids: IdArray, response: Response
    ) -> tuple[IdArray, IdArray]:
        """Count a document; returns what is written of it."""
        ids = response.ids
        if response.ended or self.recipe.append_eod:
            ids = np.append(ids, np.asarray(self.tokenizer.eod, dtype=ids.dtype))
            self.totals.ended += 1
        self.totals.text_bytes += len(prompt.encode()) + len(text.encode())
        if row.name and not any(tag in text for tag in TAGS):
            self.totals.untagged += 1
            self.untagged = [*self.untagged, row.name][:_NAMED_FILES]
        self.totals.add_document(prompt_ids.size, response.ids.size, response.statistics)
        return prompt_ids, ids

    def _count_changes(self, *encoded: tuple[str, IdArray]) -> None:
        for text, ids in encoded:
            self.totals.checked_texts += bool(text)
            self.totals.changed_texts += not self.tokenizer.keeps(text, cast(Sequence[int], ids))

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
            "encoder": self.encoder.name,
        }
        write_json_atomic(self.path.with_suffix(".json"), report, indent=None)
