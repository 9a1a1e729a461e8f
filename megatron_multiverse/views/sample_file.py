"""Samples from a text file, a JSON Lines file or standard input."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

from megatron_multiverse.config import TokenizerType
from megatron_multiverse.errors import DataError
from megatron_multiverse.views.sample_view import SampleView, view_ids, view_text


def load_view(
    source: str,
    row: int = 0,
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer",
    tokenizer_model: str = "",
    *,
    strict: bool = False,
) -> SampleView:
    """Read one sample and find its structure.

    Args:
        source: text file with a trajectory, ``.jsonl`` file, or ``-`` for a trajectory on standard input.
        row: row of a ``.jsonl`` file, from 0.
        tokenizer_type: see `data.tokenizers.build_tokenizer`.
        tokenizer_model: tokenizer that cuts the text; empty: each word, tag and newline is one token.
        strict: refuse text that breaks the grammar.

    Raises:
        DataError: no such file, row or column.
        StructureError: `strict` and the text breaks the grammar.
    """
    prompt, response = _read(source, row)
    name = "standard input" if source == "-" else f"{source}:{row}" if source.endswith(".jsonl") else source
    if not tokenizer_model:
        return view_text(response, prompt=prompt, strict=strict, sample=name)
    from megatron_multiverse.data.tokenizers import build_tokenizer

    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model)
    prompt_ids, response_ids = tokenizer.tokenize(prompt), tokenizer.tokenize(response)
    return view_ids(
        prompt_ids + response_ids,
        tokenizer.structure_vocab,
        tokenizer.id_to_text,
        prompt_length=len(prompt_ids),
        strict=strict,
        sample=name,
    )


def _read(source: str, row: int) -> tuple[str, str]:
    if source == "-":
        return "", sys.stdin.read().rstrip("\n")
    path = Path(source)
    if not path.is_file():
        raise DataError(f"no file {source}; give a trajectory text, a .jsonl file or - for standard input")
    if path.suffix != ".jsonl":
        return "", path.read_text(encoding="utf-8").rstrip("\n")
    with path.open(encoding="utf-8") as file:
        line = next(islice(file, row, None), None)
    if line is None:
        raise DataError(f"{source} has no row {row}; rows count from 0")
    from megatron_multiverse.data.prompts import resolve_columns

    values = json.loads(line)
    columns = resolve_columns(values, None)
    prompt = str(values.get(columns.prompt) or "") if columns.prompt else ""
    return prompt, str(values[columns.response])
