"""What a chat template is given of tools, their calls and results."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.server.chat_fields import ChatFields
from megatron_multiverse.server.chat_prompt import chat_prompt
from megatron_multiverse.server.config import ServerConfig
from megatron_multiverse.server.messages import Message, plain_turns
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.tool_calls import read_calls
from megatron_multiverse.server.tools import Tool, tool_use
from tests.real_tokenizers import real_tokenizer_folder
from tests.unit.server.running import MODEL, Running, running_with
from tests.unit.server.tool_samples import ADD, CALLED, CHAT, ENDS, NOW

QWEN_LIKE = r"""
{%- if tools %}
    {{- '[system]\n# Tools\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools>[end]\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '[assistant]\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}{{- '\n' }}{%- endif %}
            {{- '<tool_call>\n{"name": "' + call.function.name }}
            {{- '", "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '[end]\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '[user]' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '[end]\n' }}{%- endif %}
    {%- else %}
        {{- '[' + message.role + ']\n' + message.content + '[end]\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]\n' }}{%- endif %}
"""
"""Shows tools, calls and results in Qwen's order."""


def test_templates_see_tools_calls_and_results(templated: Running) -> None:
    strict = {"type": "function", "function": ADD["function"] | {"strict": True}}
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "sign": "plus"}'}},
        {"id": "c2", "type": "function", "function": {"name": "now", "arguments": ""}},
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
        {"role": "tool", "tool_call_id": "c2", "content": "noon"},
    ]
    shown = json.dumps(ADD)
    expected = (
        f"[system]\n# Tools\n<tools>\n{shown}\n{json.dumps(NOW)}\n</tools>[end]\n[user]\nWhat is it?[end]\n"
        '[assistant]\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "sign": "plus"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>[end]\n'
        "[user]\n<tool_response>\n5\n</tool_response>\n<tool_response>\nnoon\n</tool_response>[end]\n[assistant]\n"
    )
    body = {"messages": messages, "tools": [strict, NOW]}
    ids = templated.post("/tokenize", body).json()["tokens"]
    assert templated.post("/detokenize", {"tokens": ids}).json()["prompt"] == expected
    for choice in ("auto", "none", "required"):
        answer = templated.post(CHAT, body | {"tool_choice": choice, "max_tokens": 1, "return_token_ids": True})
        assert answer.json()["prompt_token_ids"] == ids, "who may not call still reads what was called"
    without = templated.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert templated.post("/detokenize", {"tokens": without}).json()["prompt"] == expected.partition("[end]\n")[2]
    for turn, change, message in (
        (2, {"tool_call_id": "c3"}, "answers no call of an earlier turn (ids: c1, c2)"),
        (2, {"tool_call_id": None}, "without tool_call_id"),
        (0, {"tool_calls": calls}, "only the assistant calls tools"),
        (1, {"tool_calls": [calls[0] | {"type": "custom"}]}, "a call of type 'custom'"),
        (1, {"tool_calls": calls[:1]}, "(ids: c1)"),
    ):
        wrong = [*messages[:turn], messages[turn] | change, *messages[turn + 1 :]]
        response = templated.post(CHAT, body | {"messages": wrong})
        assert response.status_code == 400 and response.json()["error"]["param"] == "messages"
        assert message in response.json()["message"]
    response = templated.post(CHAT, body | {"messages": [messages[0], messages[2]]})
    assert response.status_code == 400 and "(ids: none)" in response.json()["message"]


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_with(QWEN_LIKE, tmp_path_factory.mktemp("template")) as started:
        yield started


def test_qwens_template_shows_what_was_called_as_it_was_written() -> None:
    folder = real_tokenizer_folder("qwen3")
    model = ServedModel(ServerConfig(load=folder), HuggingFaceTokenizer(folder))
    call = {"id": "c1", "function": {"name": "add", "arguments": '{"a":1,"sign":"plus"}'}}
    turns = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call, call | {"id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
    ]
    plain = plain_turns([Message.model_validate(turn) for turn in turns])
    use = tool_use([Tool.model_validate(ADD)], None, parallel=True)
    text = asyncio.run(model.render(plain, {"tools": use.shown}))
    assert f"<tools>\n{json.dumps(ADD)}\n</tools>" in text and "<tool_response>\n5\n</tool_response>" in text
    written = text.partition("<|im_start|>assistant\n")[2].partition("<|im_end|>")[0]
    content, calls = read_calls(written.rpartition("</think>")[2], None)
    assert content.strip() == "Let me see."
    assert [(one.name, one.arguments) for one in calls] == [("add", '{"a": 1, "sign": "plus"}')] * 2
    assert text != asyncio.run(model.render(plain, {"tools": None}))


def test_the_template_for_tools_is_the_one_of_that_name(tmp_path: Path) -> None:
    """As transformers has it for tokenizers with several templates."""
    for file in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / file).symlink_to(MODEL / file)
    config = json.loads((MODEL / "tokenizer_config.json").read_text())
    templates = {
        "default": "{{ messages[0].content }}",
        "tool_use": "{{ tools }}{{ messages[0].content }}{{ messages[-1].tool_calls }}",
    }
    config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    model = ServedModel(ServerConfig(load=tmp_path), tokenizer)
    assert (model.template, model.tool_template) == (templates["default"], templates["tool_use"])
    calls = [{"type": "function", "id": "1", "function": {"name": "now", "arguments": "{}"}}]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    fields = ChatFields.model_validate({"messages": turns, "tools": [NOW]})
    asyncio.run(chat_prompt(fields, model))  # what shows the calls is the template for tools
    given = tmp_path / "chat.jinja"
    given.write_text("given")
    model = ServedModel(ServerConfig(load=tmp_path, chat_template=given), tokenizer)
    assert model.template == model.tool_template == "given"


def test_the_ids_of_a_turn_with_calls_come_back_as_they_were(templated: Running) -> None:
    user = {"role": "user", "content": "1"}
    start = f"Let me see.\n{CALLED}"
    body = {"messages": [user], "tools": [NOW], "max_tokens": 120, "return_tokenized_data": True}
    body |= {"logit_bias": ENDS, "multiverse": {"answer_start": start}}
    answer = templated.post(CHAT, body).json()["choices"][0]["message"]
    known = [*answer["prompt_token_ids"], *answer["generation_token_ids"]]
    result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "noon"}
    following = {"messages": [user, answer, result], "tools": [NOW], "max_tokens": 1, "return_token_ids": True}
    found = templated.post(CHAT, following).json()["prompt_token_ids"]
    rest = templated.http.post("/detokenize", json={"tokens": found[len(known) :]}).json()["prompt"]
    assert found[: len(known)] == known
    assert rest == "[end]\n[user]\n<tool_response>\nnoon\n</tool_response>[end]\n[assistant]\n"


def test_tools_that_the_template_does_not_show_are_refused(server: Running) -> None:
    for path in (CHAT, "/chat/completions", "/tokenize"):
        body = {"messages": [{"role": "user", "content": "a"}], "tools": [NOW], "max_tokens": 1}
        response = server.post(path, body)
        assert response.status_code == 400 and response.json()["error"]["param"] == "tools"
        assert "does not show them" in response.json()["message"]
        assert server.post(path, body | {"tools": []}).status_code == 200
