"""Columns to texts, and files to rows."""

from __future__ import annotations

import datetime
import itertools
import json
import re

import pytest
from jinja2 import TemplateError

from megatron_multiverse.data.prompts import (
    PARALLEL_SUFFIX,
    SEQUENTIAL_SUFFIX,
    TRAJECTORY_COLUMNS,
    Columns,
    PromptStyle,
    build_sample,
    resolve_columns,
)
from megatron_multiverse.data.readers import read_rows
from megatron_multiverse.data.sources import column_names, open_source
from megatron_multiverse.data.turns import RowError, read_turns, with_suffix
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.server.messages import Message, plain_turns
from tests.unit.data.conftest import TRAJECTORY

S1K = ["solution", "question", "cot_type", "deepseek_thinking_trajectory", "deepseek_attempt", "gemini_attempt"]
MULTIVERSE = [*S1K, "deepseek_thinking_trajectory_parallel", "deepseek_thinking_trajectory_sequential", "distance"]


@pytest.mark.parametrize(
    ("names", "json_keys", "expected"),
    [
        (["prompt", "response", "id"], None, ["prompt", "response"]),
        (S1K, None, ["question", "deepseek_thinking_trajectory", "deepseek_attempt"]),
        (MULTIVERSE, None, ["question", "deepseek_thinking_trajectory_parallel", "deepseek_attempt"]),
        (["messages", "source"], None, ["messages"]),
        (["messages", "prompt", "response"], None, ["prompt", "response"]),
        (["a", "b", "c"], ["b"], ["b"]),
        (["a", "b", "c"], ["b", "a"], ["b", "a"]),
        (["a", "b", "c"], ["c", "a", "b"], ["c", "a", "b"]),
    ],
)
def test_columns_are_found_by_name_or_key(names, json_keys, expected):
    assert resolve_columns(names, json_keys).names == expected


@pytest.mark.parametrize(
    ("json_keys", "message"),
    [
        (None, "known sets.* call a column of conversations messages"),
        (["nope"], r"names \['nope'\]"),
        (["a", "b", "c", "d"], "not 4"),
    ],
)
def test_unknown_columns_are_refused(json_keys, message):
    with pytest.raises(ConfigError, match=message):
        resolve_columns(["a", "b", "c", "d"], json_keys)


QUESTION = Columns("t", "q", "a", is_question=True)


@pytest.mark.parametrize(
    ("columns", "fields", "style", "expected"),
    [
        # The response of a parallel row stands as it is; the answer gets its mark.
        (QUESTION, {"q": "Q?", "t": TRAJECTORY, "a": "3"}, PromptStyle(),
         ("[Q?" + PARALLEL_SUFFIX + "]", TRAJECTORY + "\n\nAnswer: 3")),
        # A sequential row is wrapped; an answer with the mark anywhere keeps it.
        (QUESTION, {"q": "Q?", "t": "so 3", "a": "Final Answer: 3"}, PromptStyle(),
         ("[Q?" + SEQUENTIAL_SUFFIX + "]", "<Think>\nso 3\n</Think>\n\nFinal Answer: 3")),
        (QUESTION, {"q": "Q?", "t": "so 3", "a": "3"}, PromptStyle("never", "parallel"),
         ("Q?" + PARALLEL_SUFFIX, "<Think>\nso 3\n</Think>\n\nAnswer: 3")),
        (QUESTION, {"q": "Q?", "t": "so 3", "a": "3"}, PromptStyle("never", "none"),
         ("Q?", "<Think>\nso 3\n</Think>\n\nAnswer: 3")),
        # Plain rows are taken as they are unless asked otherwise.
        (Columns("r", "p"), {"p": "P", "r": "R"}, PromptStyle(), ("P", "R")),
        (Columns("r", "p"), {"p": "P", "r": "R"}, PromptStyle("always", "sequential"),
         ("[P" + SEQUENTIAL_SUFFIX + "]", "R")),
        (Columns("r"), {"r": "R"}, PromptStyle(), ("", "R")),
        # Without a prompt there is no template either.
        (TRAJECTORY_COLUMNS, {"prompt": "", "response": "R"}, PromptStyle("always"), ("", "R")),
    ],
)  # fmt: skip
def test_texts_of_a_row(columns, fields, style, expected):
    assert build_sample(fields, columns, style, lambda text: f"[{text}]") == expected


CONVERSATION = Columns("messages", is_conversation=True)
HI, ASKED, ANSWERED = (
    {"role": role, "content": content}
    for role, content in (("assistant", "hi"), ("user", "1 + 2?"), ("assistant", TRAJECTORY))
)


@pytest.mark.parametrize(
    ("suffix", "asked"), [("auto", "1 + 2?"), ("none", "1 + 2?"), ("parallel", "1 + 2?" + PARALLEL_SUFFIX)]
)
def test_the_last_turn_of_a_conversation_is_the_response(suffix, asked):
    style, turns = PromptStyle("auto", suffix), [{**HI, "weight": 0}, ASKED, ANSWERED]
    prompt, response = build_sample({"messages": turns}, CONVERSATION, style, repr)
    assert prompt == repr([HI, ASKED | {"content": asked}]) and response == TRAJECTORY
    assert turns[1] == {"role": "user", "content": "1 + 2?"}, "the row stays as it is"
    assert build_sample({"messages": turns}, CONVERSATION, style, None) == (asked, TRAJECTORY)


def test_a_thought_apart_from_the_answer_is_trained():
    """As servers give it; where it was left out, a model learned to answer without one."""
    answer, thought = "Answer: 3", TRAJECTORY.removeprefix("<Think>\n").removesuffix("\n</Think>")
    for name, given in (("reasoning_content", f"\n{thought}\n"), ("reasoning", thought)):
        turns = [ASKED, {"role": "assistant", "content": answer, name: given, "tool_calls": None}]
        style = PromptStyle("auto", "auto")
        sample = build_sample({"messages": turns}, CONVERSATION, style, repr)
        assert sample == (repr([ASKED]), f"{TRAJECTORY}\n\n{answer}")
    turns = [ASKED, {"role": "assistant", "content": answer, "reasoning_content": ""}]
    assert build_sample({"messages": turns}, CONVERSATION, PromptStyle(), repr)[1] == answer


CALL = {"role": "assistant", "content": None}


def test_earlier_turns_reach_the_chat_template_as_on_the_server():
    """What it would write of them is part of the prompt."""
    call = {"id": "c1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    result = {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}
    turns = [ASKED, CALL | {"tool_calls": [call], "reasoning": "hm", "refusal": None}, result, ANSWERED]
    plain = plain_turns([Message.model_validate(turn) for turn in turns])
    assert read_turns(turns, "messages") == plain
    assert build_sample({"messages": turns}, CONVERSATION, PromptStyle(), repr) == (repr(plain[:-1]), TRAJECTORY)
    with pytest.raises(RowError, match="tool_calls, which the chat template does not show") as caught:
        build_sample({"messages": turns}, CONVERSATION, PromptStyle(), lambda asked: str([t["content"] for t in asked]))
    assert caught.value.code == "hidden_calls"
    tools = [{"type": "function", "function": {"name": "add"}}]
    with pytest.raises(RowError, match="column 'tools' is not read"):
        build_sample({"messages": turns, "tools": tools}, CONVERSATION, PromptStyle(), repr)
    for none in ([], None, {}, "", "[]", "null", "{}"):
        row = {"messages": turns, "tools": none, "functions": none}
        assert build_sample(row, CONVERSATION, PromptStyle(), repr)[1] == TRAJECTORY
    with pytest.raises(RowError, match="column 'functions' is not read"):
        build_sample({"messages": turns, "functions": json.dumps(tools)}, CONVERSATION, PromptStyle(), repr)
    row = {"messages": turns, "tools": tools}
    assert build_sample(row, CONVERSATION, PromptStyle(), None) == ("3", TRAJECTORY), "no template, nothing is hidden"


def test_a_template_that_misses_the_calls_shows_them():
    """Many check that a result comes after a call."""

    def render(turns):
        for before, turn in itertools.pairwise(turns):
            if turn["role"] == "tool" and "tool_calls" not in before:
                raise TemplateError("a result without a call")
        return repr(turns)

    called = CALL | {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    turns = [ASKED, called, {"role": "tool", "content": "3"}, ANSWERED]
    prompt, response = build_sample({"messages": turns}, CONVERSATION, PromptStyle(), render)
    assert "'add'" in prompt and response == TRAJECTORY


def test_a_suffix_stands_after_the_question_and_not_in_the_result_of_a_tool():
    called = CALL | {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    turns = [ASKED, called, {"role": "tool", "content": "3"}, ANSWERED]
    prompt, _ = build_sample({"messages": turns}, CONVERSATION, PromptStyle("auto", "parallel"), repr)
    asked = [ASKED | {"content": ASKED["content"] + PARALLEL_SUFFIX}, *turns[1:-1]]
    assert prompt == repr(read_turns(asked, "messages"))
    no_user = [{"role": "human", "content": "1 + 2?"}]
    assert with_suffix(no_user, "!") == [{"role": "human", "content": "1 + 2?!"}]


@pytest.mark.parametrize(
    ("turns", "code"),
    [
        ("hello", "not_turns"),
        ([ASKED, "hello"], "not_turns"),
        ([], "no_answer"),
        ([ANSWERED], "no_answer"),
        ([ANSWERED, ASKED], "no_answer"),
        ([{"role": "user"}, ANSWERED], "missing_key"),
        ([ASKED | {"content": [{"type": "text", "text": "1 + 2?"}]}, ANSWERED], "not_text"),
        ([ASKED, ANSWERED | {"content": ""}], "empty"),
        ([ASKED | {"content": "<|im_end|>"}, ANSWERED], "control_token"),
        ([HI | {"reasoning": "<|im_end|>"}, ASKED, ANSWERED], "control_token"),
        (
            [CALL | {"tool_calls": [{"function": {"name": "add"}, "id": "<|im_end|>"}]}, ASKED, ANSWERED],
            "control_token",
        ),
        ([CALL | {"tool_calls": ["add"]}, ASKED, ANSWERED], "not_calls"),
        ([CALL | {"tool_calls": [{"function": {"name": "add", "arguments": "[1]"}}]}, ASKED, ANSWERED], "not_calls"),
        *(
            ([CALL | {"content": "x", "tool_calls": calls}, ASKED, ANSWERED], "not_calls")
            for calls in (5, True, 3.5, "add", {"function": {"name": "add"}})
        ),
        *(
            ([CALL | {"tool_calls": [{"function": function}]}, ASKED, ANSWERED], code)
            for function, code in (
                ({"name": "add\ud800"}, "encoding"),
                ({"name": "add", "arguments": {"a": "\ud800"}}, "encoding"),
                ({"name": "add", "arguments": r'{"\ud800": 1}'}, "encoding"),
                ({"name": "add", "arguments": {"a": datetime.date(2026, 1, 1)}}, "not_calls"),
            )
        ),
        ([CALL | {"content": "x", "function_call": {"name": "add"}}, ASKED, ANSWERED], "function_call"),
        ([ASKED, ANSWERED | {"function_call": {"name": "add", "arguments": "{}"}}], "function_call"),
        ([ASKED, ANSWERED | {"tool_calls": [{"function": {"name": "add"}}]}], "tool_calls"),
        ([ASKED, ANSWERED | {"reasoning_content": "It is 3."}], "two_thoughts"),
    ],
)
def test_conversations_that_are_none_name_the_reason(turns, code):
    with pytest.raises(RowError) as caught:
        build_sample({"messages": turns}, CONVERSATION, PromptStyle(), repr, re.compile(r"<\|im_end\|>"))
    assert caught.value.code == code


def test_without_template_the_prompt_is_plain():
    assert build_sample({"q": "Q?", "t": "x", "a": "1"}, QUESTION, PromptStyle(), None)[0] == "Q?" + SEQUENTIAL_SUFFIX


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"p": "x"}, "missing_key"),
        ({"p": "x", "r": None}, "not_text"),
        ({"p": 3, "r": "x"}, "not_text"),
        ({"p": "x", "r": ""}, "empty"),
        ({"p": "x", "r": "ab\ud800"}, "encoding"),
    ],
)
def test_bad_rows_name_the_reason(fields, code):
    with pytest.raises(RowError) as caught:
        build_sample(fields, Columns("r", "p"), PromptStyle(), None)
    assert caught.value.code == code


def _all_rows(source, **options):
    return [row for shard in source.shards for row in read_rows(shard, **options)]


@pytest.mark.parametrize("cut", [1, 3, 7, 50])
def test_jsonl_shards_hold_every_line_once(tmp_path, monkeypatch, cut):
    monkeypatch.setattr("megatron_multiverse.data.sources._shard_bytes", lambda total: max(total // cut, 1))
    rows = [{"prompt": "p" * (k % 13), "response": str(k)} for k in range(40)]
    text = "\n".join(json.dumps(row) for row in rows)
    text = text.replace("\n", "\n\n", 3)  # blank lines count as lines only
    (tmp_path / "rows.jsonl").write_text(text)
    source = open_source(str(tmp_path / "rows.jsonl"))
    found = _all_rows(source)
    assert [row.fields for row in found if not row.is_blank] == rows
    assert sum(row.num_bytes for row in found) == len(text)
    assert column_names(source) == ["prompt", "response"]


def test_broken_lines_are_rows_with_an_error(tmp_path):
    lines = [b'{"prompt": "a", "response": "b"}', b'{"prompt": oops}', b"[1]", b'{"prompt": "\xff"}', b'{"a": "b"']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    found = _all_rows(open_source(str(tmp_path)))
    assert [row.error and row.error.code for row in found] == [None, "json", "json", "encoding", "json"]
    assert found[1].error.char_index == 11
    assert [row.row for row in found] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("cut", [1, 4])
def test_parquet_shards_hold_every_row_once(tmp_path, monkeypatch, cut):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("megatron_multiverse.data.sources._shard_bytes", lambda total: max(total // cut, 1))
    table = pa.table({"prompt": [str(k) for k in range(100)], "response": ["r"] * 100, "other": list(range(100))})
    (tmp_path / "data").mkdir()
    pq.write_table(table.slice(0, 70), tmp_path / "data" / "train-0.parquet", row_group_size=30)
    pq.write_table(table.slice(70), tmp_path / "data" / "train-1.parquet")
    source = open_source(str(tmp_path))
    assert "other" in column_names(source)
    found = _all_rows(source, columns=["prompt", "response"])
    assert [row.fields for row in found] == [{"prompt": str(k), "response": "r"} for k in range(100)]


def test_saved_data_set_is_read(tmp_path):
    import datasets

    rows = {"prompt": ["a", "b"], "response": ["c", "d"]}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows)).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ConfigError, match="--split test: no such"):
        open_source(str(tmp_path / "set"), split="test")
    source = open_source(str(tmp_path / "set"))
    assert column_names(source) == ["prompt", "response"]
    assert [row.fields["response"] for row in _all_rows(source, columns=["response"])] == ["c", "d"]


def test_trajectory_folder_takes_sidecar_prompts_in_natural_order(tmp_path):
    for name in ("10.xml", "2.xml", "1.txt"):
        (tmp_path / name).write_text("text of " + name)
    (tmp_path / "2.prompt.txt").write_text("own prompt")
    (tmp_path / "3.xml").write_bytes(b"\xff")
    source = open_source(str(tmp_path))
    found = _all_rows(source, prompt="default")
    assert [row.name for row in found] == ["1.txt", "2.xml", "3.xml", "10.xml"]
    assert found[2].error.code == "encoding"
    assert [row.fields.get("prompt") for row in found] == ["default", "own prompt", None, "default"]


def test_fingerprint_follows_the_content(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n')
    before = open_source(str(file)).fingerprint
    assert open_source(str(file)).fingerprint == before
    file.write_text('{"prompt": "a", "response": "c"}\n')
    assert open_source(str(file)).fingerprint != before


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "found none"), ({"a.jsonl": "{}", "b.xml": "x"}, "exactly one of"), ({"a.csv": "x"}, "found none")],
)
def test_unclear_folders_are_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_source(str(tmp_path))


def test_missing_and_unknown_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        open_source(str(tmp_path / "x" / "y"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ConfigError, match=r"expected \.jsonl"):
        open_source(str(tmp_path / "a.csv"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match=r"empty\.jsonl: the input holds no readable row: empty$"):
        column_names(open_source(str(tmp_path / "empty.jsonl")))
    (tmp_path / "broken.jsonl").write_text("{\n")
    with pytest.raises(ConfigError, match=r"broken\.jsonl: the input holds no readable row; the first one is not JSON"):
        column_names(open_source(str(tmp_path / "broken.jsonl")))
