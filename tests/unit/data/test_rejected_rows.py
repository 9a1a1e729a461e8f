"""One row that cannot be used is rejected with its number and a reason; all other rows are written."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_multiverse.data import readers, shard_worker
from megatron_multiverse.data.encoders import PlainEncoder
from megatron_multiverse.data.preprocess import preprocess_data
from megatron_multiverse.data.prompts import Columns, PromptStyle, build_sample
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.data.turns import RowError
from tests.unit.data.test_preprocess import _config, _write_rows

GOOD = '{"prompt": "p", "response": "fine"}'


def run(tmp_path, folder, lines, **options):
    """Preprocess lines between good ones; returns the rejected rows and the responses that were written."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    (tmp_path / "rows.jsonl").write_text("\n".join([GOOD, *lines, GOOD]) + "\n")
    result = preprocess_data(_config(tmp_path / "rows.jsonl", tmp_path / "out", folder, **options))
    report = tmp_path / "out_rejected.jsonl"
    rejected = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    dataset = IndexedDataset(str(tmp_path / "out"))
    return rejected, [dataset[k].tolist() for k in range(1, 2 * result.totals.documents, 2)]


ODD = {
    "a number of 5,000 digits": ('{"prompt": "a", "response": "b", "n": ' + "1" * 5000 + "}", "json"),
    "nested 100,000 deep": ("[" * 100_000, "json"),
    "half a surrogate pair as a key": ('{"\\ud800": "a"}', "missing_key"),
    "half a surrogate pair in a text": ('{"prompt": "a", "response": "\\ud800"}', "encoding"),
    "a list": ('["a"]', "json"),
    "no text": ('{"prompt": "a", "response": {"a": 1}}', "not_text"),
}


@pytest.mark.parametrize(("line", "code"), ODD.values(), ids=ODD)
def test_an_odd_row_harms_no_other(tmp_path, hf_folder, line, code):
    rejected, written = run(tmp_path, hf_folder, [line])
    assert [(entry["row"], entry["reason"]) for entry in rejected] == [(2, code)]
    assert rejected[0]["message"] and len(written) == 2


class OddCell:
    def as_py(self):
        raise OverflowError("a date in the year 300000")


def test_an_odd_cell_of_a_parquet_file_harms_no_other(tmp_path, hf_folder, monkeypatch):
    original = readers.cells

    def with_odd_cell(batch, index):
        return {"response": OddCell()} if index == 1 else original(batch, index)

    monkeypatch.setattr(readers, "cells", with_odd_cell)
    pq.write_table(pa.table({"prompt": ["p"] * 3, "response": ["r"] * 3}), tmp_path / "rows.parquet")
    result = preprocess_data(_config(tmp_path / "rows.parquet", tmp_path / "out", hf_folder))
    assert (result.totals.documents, result.totals.rejected) == (2, {"unreadable": 1})


class Panic(BaseException):
    """As a panic in a library written in Rust arrives."""


@pytest.mark.parametrize("error", [Panic("overflow"), ValueError("odd"), RecursionError()])
def test_a_text_that_a_tokenizer_cannot_read_harms_no_other(tmp_path, hf_folder, monkeypatch, error):
    original = type(build_tokenizer("HuggingFaceTokenizer", hf_folder)).tokenize_batch

    def fails(self, texts):
        if "bad" in texts:
            raise error
        return original(self, texts)

    monkeypatch.setattr("megatron_multiverse.data.tokenizers.HuggingFaceTokenizer.tokenize_batch", fails)
    rejected, written = run(tmp_path, hf_folder, ['{"prompt": "p", "response": "bad"}'], encoder="tokenizers")
    assert [(entry["row"], entry["reason"]) for entry in rejected] == [(2, "tokenizer")]
    assert len(written) == 2


def test_ctrl_c_is_no_odd_row(hf_folder, monkeypatch):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", hf_folder)
    monkeypatch.setattr(tokenizer, "tokenize_batch", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shard_worker.encode_each(PlainEncoder(tokenizer), ["a", "b"])


def test_a_prompt_that_the_template_refuses_harms_no_other(tmp_path, glued_folder):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", glued_folder)
    tokenizer.save(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% if 'rude' in messages[0].content %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    )
    rude = '{"prompt": "rude", "response": "x"}'
    rejected, written = run(tmp_path, tmp_path / "model", [rude], chat_template="always")
    assert [(entry["row"], entry["reason"]) for entry in rejected] == [(2, "chat_template")]
    assert len(written) == 2


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u3000"])
@pytest.mark.parametrize("column", ["q", "t", "a"])
def test_every_column_must_hold_text(blank, column):
    fields = {"q": "Q?", "t": "so 3", "a": "3"} | {column: blank}
    with pytest.raises(RowError, match=f"column '{column}'") as caught:
        build_sample(fields, Columns("t", "q", "a", is_question=True), PromptStyle(), None)
    assert caught.value.code == "empty"


def test_a_thought_after_a_newline_is_not_wrapped_again():
    fields = {"q": "Q?", "t": "\n<Think>\nt\n</Think>", "a": "4"}
    _, response = build_sample(fields, Columns("t", "q", "a", is_question=True), PromptStyle(), None)
    assert response == "\n<Think>\nt\n</Think>\n\nAnswer: 4"


@pytest.mark.parametrize(
    ("response", "char_index"),
    [("<|im_end|> ends a turn", 0), ("e\u0301 <|im_start|>", 3), ("a<|im_end|>\n", 1), ("a<|im_end|><|im_end|>", 1)],
)
def test_control_tokens_in_a_response_are_refused(tmp_path, glued_folder, response, char_index):
    row = json.dumps({"prompt": "p", "response": response})
    for options in ({}, {"append_eod": True}):
        rejected, written = run(tmp_path, glued_folder, [row], **options)
        assert [(e["row"], e["reason"], e["char_index"]) for e in rejected] == [(2, "control_token", char_index)]
        assert len(written) == 2


def test_an_end_token_is_written_once(tmp_path, glued_folder):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", glued_folder)
    row = '{"prompt": "p", "response": "fine<|im_end|>"}'
    fine = tokenizer.tokenize("fine")
    _, written = run(tmp_path, glued_folder, [row], append_eod=True)
    assert written == [[*fine, tokenizer.eod]] * 3
    _, written = run(tmp_path, glued_folder, [row])
    assert written == [fine, [*fine, tokenizer.eod], fine]
    rejected, _ = run(tmp_path, glued_folder, ['{"prompt": "p", "response": "<|im_end|>"}'])
    assert [entry["reason"] for entry in rejected] == ["empty"]


def test_only_the_template_writes_control_tokens_of_a_question(tmp_path, glued_folder):
    question = {"question": "a <|im_end|>", "trajectory": "t", "answer": "1"}
    source = _write_rows(tmp_path / "q.jsonl", [question, question | {"question": "a"}])
    keys = ["question", "trajectory", "answer"]
    result = preprocess_data(_config(source, tmp_path / "q", glued_folder, json_keys=keys, max_rejected=1))
    assert (result.totals.documents, result.totals.rejected) == (1, {"control_token": 1})
    assert "<|im_start|>user\\nQUESTION<|im_end|>" in result.template
    rendered = "<|im_start|>user\na<|im_end|>\n<|im_start|>a\n"  # a prompt that is taken as it is
    source = _write_rows(tmp_path / "p.jsonl", [{"prompt": rendered, "response": "b"}])
    assert preprocess_data(_config(source, tmp_path / "p", glued_folder)).totals.documents == 1


def test_the_report_says_that_no_response_ends(tmp_path, glued_folder):
    rows = [{"prompt": "p", "response": "a"}, {"prompt": "p", "response": "b<|im_end|>"}]
    for count, options, expected in (
        (1, {}, "no response ends with the end token"),
        (2, {}, "1 responses do not end with the end token"),
        (2, {"append_eod": True}, None),
    ):
        source = _write_rows(tmp_path / "rows.jsonl", rows[:count])
        lines = preprocess_data(_config(source, tmp_path / "out", glued_folder, **options)).totals.lines()
        warnings = [line for line in lines if line.startswith("WARNING")]
        assert (expected in warnings[0]) if expected else not warnings


@pytest.mark.parametrize(
    ("text", "character"),
    [
        ("<Parallel>\r\n<Goal>", "\r"),
        ("e\u0301e\u0301 <Parallel>\n\n<Goal>", "\n<Goal>"),  # the tokenizer composes the accents
        ("e\u0301 </Path>", "</Path>"),
    ],
)
def test_the_place_is_that_in_the_text_as_given(tmp_path, glued_folder, text, character):
    from tokenizers import Tokenizer, normalizers

    backend = Tokenizer.from_file(str(glued_folder / "tokenizer.json"))
    backend.normalizer = normalizers.NFC()
    (tmp_path / "nfc").mkdir()
    backend.save(str(tmp_path / "nfc" / "tokenizer.json"))
    rejected, _ = run(tmp_path, tmp_path / "nfc", [json.dumps({"prompt": "p", "response": text})])
    assert text[rejected[0]["char_index"] :].startswith(character)
    assert ("carriage return" in rejected[0]["message"]) == (character == "\r")


def test_every_changed_text_is_counted(tmp_path, glued_folder):
    from tokenizers import Tokenizer, normalizers

    backend = Tokenizer.from_file(str(glued_folder / "tokenizer.json"))
    backend.normalizer = normalizers.NFC()
    (tmp_path / "nfc").mkdir()
    backend.save(str(tmp_path / "nfc" / "tokenizer.json"))
    rows = [{"prompt": "p", "response": text} for text in ("plain", "e\u0301", "\u00e9", "x" * 9000 + "e\u0301")]
    source = _write_rows(tmp_path / "rows.jsonl", rows)
    totals = preprocess_data(_config(source, tmp_path / "out", tmp_path / "nfc")).totals
    assert (totals.changed_texts, totals.checked_texts) == (2, 8)
