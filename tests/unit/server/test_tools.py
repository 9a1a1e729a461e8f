"""Tools that a chat may call, through the OpenAI SDK against a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

pytest.importorskip("llguidance")

from tests.unit.server.running import PROMPT, Running, running_with
from tests.unit.server.tool_samples import ADD, CALLED, CHAT, ENDS, NAMED, NOW, function

SHOWN = "{% if tools %}{{ tools | map(attribute='function.name') | join(' ') }}: {% endif %}"
"""Tools in few words, so that the small model still thinks as it has learned to."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose template shows tools."""
    template = SHOWN + "{{ messages | map(attribute='content') | join('\n') }}"
    with running_with(template, tmp_path_factory.mktemp("template")) as started:
        yield started


def asked(**options: Any) -> dict[str, Any]:
    user = {"role": "user", "content": PROMPT}
    return {"model": "model", "messages": [user], "temperature": 0, "max_tokens": 900, "tools": [ADD, NOW], **options}


def written(text: str, **options: Any) -> dict[str, Any]:
    """A request whose answer is this text: the model only ends it."""
    return asked(**options, extra_body={"logit_bias": ENDS, "multiverse": {"answer_start": text}})


def streamed(client: openai.OpenAI, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices that the chunks of a stream make, put together as the SDK's own helper does."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            made = choices.setdefault(choice.index, {"content": "", "thought": "", "calls": [], "pieces": 0})
            made["content"] += choice.delta.content or ""
            made["thought"] += getattr(choice.delta, "reasoning_content", None) or ""
            made["finish_reason"] = choice.finish_reason
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    assert call.index == len(made["calls"]) and call.type == "function"
                    made["calls"].append({"id": call.id, "name": call.function.name, "arguments": ""})
                made["calls"][call.index]["arguments"] += call.function.arguments
                made["pieces"] += 1
    return [choices[index] for index in sorted(choices)]


def test_a_required_call_follows_the_thought_and_streams_as_it_is_drawn(client: openai.OpenAI, server: Running) -> None:
    options = asked(tool_choice="required", parallel_tool_calls=False)
    (choice,) = client.chat.completions.create(**options).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name in ("add", "now") and call.type == "function" and call.id.startswith("call_")
    assert call.function.name == "now" or (arguments["sign"] in ("plus", "minus") and 0 <= arguments["a"] <= 99)
    thought = choice.message.reasoning_content
    assert "<Path>" in thought and "tool_call" not in thought
    with server.in_step():
        (made,) = streamed(client, options)
    assert (made["content"], made["thought"], made["finish_reason"]) == ("", thought, "tool_calls")
    (again,) = made["calls"]
    assert (again["name"], again["arguments"]) == (call.function.name, call.function.arguments)
    assert made["pieces"] > 1 + (call.function.name == "add")


def test_a_named_function_is_called_once_by_its_schema(client: openai.OpenAI, server: Running) -> None:
    options = asked(tool_choice=NAMED, extra_body={"logit_bias": {"282": -100}}, n=3, temperature=1, seed=4)
    whole = client.chat.completions.create(**options).choices
    for choice in whole:
        (call,) = choice.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "add" and sorted(arguments) == ["a", "sign"] and 0 <= arguments["a"] <= 99
        assert call.function.arguments == json.dumps(arguments), "written as in what models are trained on"
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
    found = [choice.message.tool_calls[0].function.arguments for choice in whole]
    assert len({choice.message.tool_calls[0].id for choice in whole}) == 3 and len(set(found)) > 1
    with server.in_step():
        made = streamed(client, options)
    assert [one["calls"][0]["arguments"] for one in made] == found
    assert all(len(one["calls"]) == 1 and one["finish_reason"] == "tool_calls" for one in made)
    assert all(one["pieces"] > 5 for one in made)


class Add(BaseModel):
    """What the client library makes a strict function of."""

    sign: Literal["plus", "minus"]


def test_the_stream_helper_of_the_client_rebuilds_the_answer(client: openai.OpenAI) -> None:
    options = asked(tools=[openai.pydantic_function_tool(Add, name="add")], tool_choice="required")
    options |= {"parallel_tool_calls": False, "extra_body": {"logit_bias": {"282": -100}}}
    with client.chat.completions.stream(**options) as stream:
        names = [event.name for event in stream if event.type == "tool_calls.function.arguments.delta"]
        done = stream.get_final_completion().choices[0]
    assert done.finish_reason == "tool_calls" and len(names) > 3 and set(names) == {"add"}
    (call,) = done.message.tool_calls
    assert call.function.parsed_arguments.sign in ("plus", "minus")


def test_calls_are_read_after_the_thought_and_what_stands_around_them_is_content(client: openai.OpenAI) -> None:
    text = f"<Think>\n{CALLED}\n</Think>\nLet me see.\n{CALLED}\n{CALLED}"
    for most in (2, 1):
        options = written(text, parallel_tool_calls=most > 1)
        (choice,) = client.chat.completions.create(**options).choices
        assert choice.finish_reason == "tool_calls" and choice.message.content == "\nLet me see."
        assert choice.message.reasoning_content == f"\n{CALLED}\n"
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert calls == [("now", '{"zone": "Asia/Tōkyō"}')] * most
        (made,) = streamed(client, options)
        assert made["content"] == choice.message.content and made["thought"] == choice.message.reasoning_content
        assert [(call["name"], call["arguments"]) for call in made["calls"]] == calls
        assert made["finish_reason"] == "tool_calls"


def test_text_without_calls_and_broken_ones_stay_content(client: openai.OpenAI) -> None:
    for text in ("Hello <b>", '<tool_call>\n{"name": "now", "arguments": [1]}\n</tool_call>', "<tool_call>now()"):
        (choice,) = client.chat.completions.create(**written(text)).choices
        assert choice.message.content == text and not choice.message.tool_calls and choice.finish_reason == "stop"
        (made,) = streamed(client, written(text))
        assert (made["content"], made["calls"], made["finish_reason"]) == (text, [], "stop")
    (choice,) = client.chat.completions.create(**written(CALLED, tool_choice="none")).choices
    assert choice.message.content == CALLED and not choice.message.tool_calls and choice.finish_reason == "stop"
    start = '<tool_call>\n{"name": "add", "arguments": {"a": '
    options = asked(
        tool_choice="required", max_tokens=48, extra_body={"logit_bias": ENDS, "multiverse": {"answer_start": start}}
    )
    (choice,) = client.chat.completions.create(**options).choices
    assert (
        choice.finish_reason == "length" and choice.message.content.startswith(start) and not choice.message.tool_calls
    )
    (made,) = streamed(client, options)
    assert made["finish_reason"] == "length" and made["calls"][0]["arguments"].startswith('{"a": ')


def strict(parameters: dict[str, Any]) -> dict[str, Any]:
    return function(strict=True, parameters=parameters)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "web_search"}]}, "tools", "type 'web_search'"),
    ({"tools": [{"type": "function"}]}, "tools", "without function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools", "name"),
    ({"tools": {}}, "tools", "list"),
    ({"tools": [function(name="")]}, "tools", "1 to 256"),
    ({"tools": [function(name="f" * 300)]}, "tools", "300 characters"),
    ({"tools": [ADD, ADD]}, "tools", "several functions are called 'add'"),
    ({"tools": [function(parameters=[])]}, "tools", "object"),
    ({"tools": [function(parameters={"type": "string"})]}, "tools", "a schema of type 'string'"),
    ({"tools": [function(strict="yes")]}, "tools", "boolean"),
    ({"tool_choice": "any"}, "tool_choice", "none, auto, required or"),
    ({"tool_choice": 5}, "tool_choice", "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "'allowed_tools'"),
    ({"tool_choice": {"function": {"name": "sub"}}}, "tool_choice", "'sub' among the tools (add, now)"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"tools": None, "tool_choice": NAMED}, "tool_choice", "no function 'add'"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
    ({"tools": [function(parameters={"properties": 5})], "tool_choice": "required"}, "tools", "properties must be"),
    ({"tools": [strict({"properties": {"a": {"pattern": "(("}}})]}, "tools", "unclosed group"),
    ({"tools": [strict({"x-guidance": 3})]}, "tools", "function 'f' cannot be held"),
    ({"tools": [strict({"$ref": "#/$defs/x"})]}, "tools", "function 'f' cannot be held"),
    ({"tools": [strict({"properties": {"a": {"description": "x" * 70_000}}})]}, "tools", "65536"),
    ({"regex": "a"}, "tools", "not together with a regex"),
    ({"guided_json": "{"}, "tools", "must be a JSON object"),
    ({"guided_json": "{}", "regex": "a"}, "regex", "not together with guided_json"),
    ({"multiverse": {"separate_reasoning": False}}, "tools", "calls stand after the thought"),
    ({"multiverse": {"stream_mode": "branches"}, "stream": True}, "tools", "give stream_mode linear"),
    ({"logprobs": True}, "logprobs", "not of calls"),
    ({"tool_choice": "required", "min_tokens": 3}, "grammar", "min_tokens"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_what_is_wrong_about_tools_is_named(server: Running, fields: dict[str, Any], param: str, message: str) -> None:
    response = server.post(CHAT, asked() | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and message in error["message"] and len(error["message"]) < 700
