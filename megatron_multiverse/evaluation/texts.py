"""Rows of outputs and data sets as texts with their structure, for `evaluation.parallelism`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_multiverse.data.prompts import TRAJECTORY_COLUMNS, Columns, PromptStyle, build_sample, resolve_columns
from megatron_multiverse.data.readers import RawRow
from megatron_multiverse.data.sources import Source, column_names
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.data.turns import RowError
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.views.sample_view import SampleView, view_ids, view_text

_OUTPUT_COLUMNS = Columns("text", "prompt")
"""Of what tools/generate.py and tools/evaluate.py write."""
_RECORD_COLUMNS = ("prompt_ids", "token_ids")
"""Of answers as token ids: the records of tools/generate.py, rollouts.jsonl of reinforcement learning."""


class Texts:
    """Says of each row what was asked, what the response is, and how it is built.

    Args:
        source: where the rows are from.
        json_keys: columns, as in tools/preprocess_data.py; None for those of a known set.
        tokenizer: counts tokens and reads records; None lets each word, tag and newline be one token.

    Raises:
        ConfigError: no such columns, or records without a tokenizer.
    """

    def __init__(self, source: Source, json_keys: Sequence[str] | None, tokenizer: MultiverseTokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._columns: Columns | None = TRAJECTORY_COLUMNS
        if not source.is_trajectories:
            self._columns = self._choose(column_names(source), json_keys)

    def _choose(self, names: Sequence[str], json_keys: Sequence[str] | None) -> Columns | None:
        """The columns of texts; None for records."""
        if not json_keys and set(_RECORD_COLUMNS) <= set(names):
            if self._tokenizer is None:
                raise ConfigError(
                    "the input has records of answers, which are token ids: name the tokenizer that they are of with "
                    "--tokenizer-model, such as the folder of the model"
                )
            return None
        if not json_keys and set(_OUTPUT_COLUMNS.names) <= set(names):
            return _OUTPUT_COLUMNS
        return resolve_columns(names, json_keys)

    def read(self, row: RawRow) -> tuple[str, str, SampleView]:
        """Question, response and its view.

        Raises:
            RowError: the row holds none.
        """
        if row.error is not None:
            raise row.error
        if self._columns is None:
            return self._record(row.fields)
        question, text = build_sample(row.fields, self._columns, PromptStyle("never"), None)
        return question, text, self._view(text)

    def _view(self, text: str) -> SampleView:
        if self._tokenizer is None:
            return view_text(text)
        tokenizer = self._tokenizer
        return view_ids(tokenizer.tokenize_response(text), tokenizer.structure_vocab, tokenizer.id_to_text)

    def _record(self, fields: Mapping[str, Any]) -> tuple[str, str, SampleView]:
        tokenizer = self._tokenizer
        assert tokenizer is not None
        for name in _RECORD_COLUMNS:
            ids = fields.get(name)
            if not (isinstance(ids, list) and all(type(token) is int for token in ids)):
                raise RowError("missing_key", f"{name} is no list of token ids")
            if not all(0 <= token < len(tokenizer.id_to_text) for token in ids):
                raise RowError(
                    "other_tokenizer", f"{name} has ids beyond the {len(tokenizer.id_to_text)} of the tokenizer"
                )
        question, ids = tokenizer.detokenize(fields["prompt_ids"]), fields["token_ids"]
        return question, tokenizer.detokenize(ids), view_ids(ids, tokenizer.structure_vocab, tokenizer.id_to_text)
