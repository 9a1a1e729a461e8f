"""Samples as preprocessing reads them: from any of its inputs, or from standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_multiverse.config import TokenizerType
from megatron_multiverse.data.prompts import TRAJECTORY_COLUMNS, PromptStyle, build_sample, resolve_columns
from megatron_multiverse.data.readers import RawRow, read_rows, trajectory_text
from megatron_multiverse.data.sources import Source, column_names, open_source
from megatron_multiverse.data.turns import RowError
from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.structure import check_text
from megatron_multiverse.views.sample_view import SampleView, view_ids, view_text


def load_view(
    source: str,
    row: int = 1,
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer",
    tokenizer_model: str = "",
    *,
    json_keys: Sequence[str] | None = None,
    split: str | None = None,
    strict: bool = False,
) -> SampleView:
    """Read one sample as preprocessing does, without its chat template, and find its structure.

    Args:
        source: what `data.sources.open_source` takes, or ``-`` for a trajectory on standard input.
        row: which row, from 1, counted as in the list of rejected rows.
        tokenizer_type: see `data.tokenizers.build_tokenizer`.
        tokenizer_model: tokenizer that cuts the text; empty: each word, tag and newline is one token.
        json_keys: see `data.prompts.resolve_columns`.
        split: see `data.sources.open_source`.
        strict: refuse text that preprocessing would reject.

    Raises:
        ConfigError: no such input, column or tokenizer.
        DataError: no such row, or one that preprocessing would reject before it looks at its structure.
        StructureError: `strict` and the text breaks the grammar.
    """
    prompt, response, name = _read(source, row, json_keys, split)
    if strict:
        check_text(response, sample=name)
    if not tokenizer_model:
        return view_text(response, prompt=prompt, sample=name)
    from megatron_multiverse.data.responses import ResponseReader
    from megatron_multiverse.data.tokenizers import build_tokenizer

    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model)
    if strict:
        try:
            ResponseReader(tokenizer).read(response, tokenizer.tokenize(response))
        except RowError as error:
            raise DataError(f"{name}: {error.code}: {error}") from error
    prompt_ids, response_ids = tokenizer.tokenize(prompt), tokenizer.tokenize_response(response)
    return view_ids(
        prompt_ids + response_ids,
        tokenizer.structure_vocab,
        tokenizer.id_to_text,
        prompt_length=len(prompt_ids),
        sample=name,
    )


def _read(source: str, row: int, json_keys: Sequence[str] | None, split: str | None) -> tuple[str, str, str]:
    """Prompt, response and name of the sample."""
    if source == "-":
        try:
            return "", trajectory_text(sys.stdin.buffer.read()), "standard input"
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8 at byte {error.start}") from error
    opened = open_source(source, split=split)
    if len(opened.files) > 1 and not opened.is_trajectories:
        count = len(opened.files)
        raise ConfigError(f"--input {source} stands for {count} files; name one of them, e.g. {opened.files[0]}")
    columns = TRAJECTORY_COLUMNS if opened.is_trajectories else resolve_columns(column_names(opened), json_keys)
    found = _row(opened, row)
    name = found.name or f"{source}:{row}"
    try:
        if found.error is not None:
            raise found.error
        # The template is left out, so that the picture shows the question alone.
        return *build_sample(found.fields, columns, PromptStyle("never"), None), name
    except RowError as error:
        raise DataError(f"{name}: {error.code}: {error}") from error


def _row(source: Source, number: int) -> RawRow:
    count = 0
    for shard in source.shards:
        for row in read_rows(shard):
            count += 1
            if count == number and not row.is_blank:
                return row
    raise DataError(f"no row {number}: rows count from 1, blank lines too, and there are {count}")
