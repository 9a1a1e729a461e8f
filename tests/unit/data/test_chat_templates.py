"""Templates by name, and prompts that do not depend on the day."""

from __future__ import annotations

import datetime
import json

import pytest

from megatron_multiverse.data.chat_templates import fix_date, named_templates
from megatron_multiverse.data.preprocess import preprocess_data
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.errors import ConfigError
from tests.unit.data.test_preprocess import _bytes, _config, _write_rows

QUESTION = {"question": "Q", "trajectory": "t", "answer": "1"}
KEYS = ["question", "trajectory", "answer"]
DATED = (
    "\n{% set date = strftime_now('%d %b %Y') if strftime_now is defined else 'never' %}"
    '{{ date }} {{ strftime_now("%Y") }} {{ messages[0].content }}'
)


def with_template(folder, tmp_path, template):
    HuggingFaceTokenizer(folder).save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return tmp_path / "model"


@pytest.mark.parametrize(
    "template",
    [
        [{"name": "tool_use", "template": "t"}, {"name": "rag", "template": "r"}],
        {"tool_use": "t", "rag": "r"},
    ],
)
def test_templates_without_default_are_refused_by_name_when_one_is_needed(tmp_path, hf_folder, template):
    model = with_template(hf_folder, tmp_path, template)
    source = _write_rows(tmp_path / "rows.jsonl", [QUESTION])
    with pytest.raises(ConfigError, match="called rag, tool_use, but none called default"):
        preprocess_data(_config(source, tmp_path / "out", model, json_keys=KEYS))
    result = preprocess_data(_config(source, tmp_path / "out", model, json_keys=KEYS, chat_template="never"))
    assert result.totals.documents == 1 and result.template.startswith("not applied")


def test_a_mapping_with_default_is_applied(tmp_path, hf_folder):
    model = with_template(hf_folder, tmp_path, {"default": "[{{ messages[0].content }}]", "rag": "r"})
    source = _write_rows(tmp_path / "rows.jsonl", [QUESTION])
    result = preprocess_data(_config(source, tmp_path / "out", model, json_keys=KEYS))
    assert result.template == "applied: '[QUESTION]'"


@pytest.mark.parametrize("value", [3, ["x"], [{"name": "default"}], {"default": 3}])
def test_what_holds_no_template_is_refused(value):
    with pytest.raises(ConfigError, match="holds no templates"):
        named_templates(value)


def test_a_template_that_fails_is_a_clear_error(tmp_path, hf_folder):
    model = with_template(hf_folder, tmp_path, "{{ messages[0].content | no_such_filter }}")
    source = _write_rows(tmp_path / "rows.jsonl", [QUESTION])
    with pytest.raises(ConfigError, match=r"chat template fails .*no_such_filter.*--chat-template never"):
        preprocess_data(_config(source, tmp_path / "out", model, json_keys=KEYS))


def test_the_date_of_a_template_is_fixed(tmp_path, hf_folder):
    model = with_template(hf_folder, tmp_path, DATED)
    tokenizer = HuggingFaceTokenizer(model)
    date = datetime.date(2026, 1, 31)
    assert tokenizer.render_chat("hi", date=date) == "\n31 Jan 2026 2026 hi"
    today = tokenizer.render_chat("hi")
    assert today.endswith(" hi") and "2026-01-31" not in today  # the clock itself is not touched
    source = _write_rows(tmp_path / "rows.jsonl", [QUESTION])
    outputs = []
    for given in ({}, {"template_date": "2026-01-31"}):
        result = preprocess_data(_config(source, tmp_path / "out", model, json_keys=KEYS, **given))
        outputs.append(_bytes(tmp_path / "out"))
        assert f"its date always {given.get('template_date', '2024-07-26')}" in result.template
    assert outputs[0] != outputs[1]


def test_a_template_without_clock_is_rendered_as_it_is(tmp_path, hf_folder):
    model = with_template(hf_folder, tmp_path, "{{ messages[0].content }}")
    assert HuggingFaceTokenizer(model).render_chat("hi", date=datetime.date(2026, 1, 31)) == "hi"


def test_a_computed_date_format_is_refused():
    with pytest.raises(ConfigError, match="computed format"):
        fix_date("{{ strftime_now(x) }}", datetime.date(2026, 1, 31))


def test_a_date_must_be_one(tmp_path, hf_folder):
    with pytest.raises(ConfigError, match="must be a date such as"):
        _config(tmp_path, tmp_path / "out", hf_folder, template_date="today")
