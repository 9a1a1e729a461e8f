"""Answers held to a grammar over HTTP, in the words of OpenAI, vLLM and SGLang."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from megatron_multiverse.server.errors import ApiError
from megatron_multiverse.server.grammars import grammar_of
from tests.unit.server.running import PROMPT, Running

NAME = "model"
MESSAGES = [{"role": "user", "content": PROMPT}]
SCHEMA = {
    "type": "object",
    "properties": {"A": {"type": "integer", "minimum": 0, "maximum": 9999}, "sure": {"type": "boolean"}},
    "required": ["A", "sure"],
    "additionalProperties": False,
}


class Sum(BaseModel):
    """What the client library makes a schema of."""

    sign: Literal["plus", "minus"]


def test_a_chat_answers_in_json_and_its_thought_comes_apart(client: openai.OpenAI) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA, "strict": True}}
    options: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "temperature": 0, "response_format": wanted}
    message = client.chat.completions.create(**options).choices[0].message
    assert sorted(json.loads(message.content)) == ["A", "sure"]
    assert "<Path>" in message.reasoning_content and "Think>" not in message.reasoning_content
    content = "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)
    )
    assert content == message.content
    together = {"multiverse": {"separate_reasoning": False}}
    whole = client.chat.completions.create(**options, extra_body=together).choices[0].message.content
    assert whole.startswith("<Think>") and whole.endswith(f"</Think>{message.content}")


def test_the_client_library_reads_its_own_classes(client: openai.OpenAI) -> None:
    done = client.chat.completions.parse(
        model=NAME,
        messages=MESSAGES,  # type: ignore[arg-type]
        response_format=Sum,
        temperature=0,
    )
    parsed = done.choices[0].message.parsed
    assert parsed is not None and parsed.sign in ("plus", "minus")


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[xyz]{5}"}}, "[xyz]{5}"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"structured_outputs": {"grammar": 'root ::= "<" [0-9] ">"'}}, "<[0-9]>"),
        ({"guided_choice": ["up", "down"]}, "up|down"),
        ({"guided_regex": "q+w"}, "q+w"),
        ({"regex": "(ab)+c"}, "(ab)+c"),
        ({"ebnf": 'root ::= "k" root | "m"'}, "k*m"),
        ({"json_schema": '{"enum": [17, null]}'}, "17|null"),
        ({"structured_outputs": {"json": {"const": [1]}}}, r"\[1\]"),
    ],
)
def test_vllms_and_sglangs_words(server: Running, fields: dict[str, Any], pattern: str) -> None:
    body = {"prompt": "abc", "max_tokens": 400, "temperature": 1, "seed": 1, "logit_bias": {"282": -100}} | fields
    answer = server.post("/v1/completions", body).json()["choices"][0]
    assert answer["finish_reason"] == "stop" and re.fullmatch(pattern, answer["text"]), answer
    assert server.post("/v1/completions", body).json()["choices"][0]["text"] == answer["text"]


def test_rollouts_are_held_to_grammars(server: Running) -> None:
    sampling = {"regex": "[ab]{3}", "max_new_tokens": 50, "sampling_seed": 3, "logit_bias": {"282": -100}}
    answer = server.post("/generate", {"text": "abc", "sampling_params": sampling}).json()
    assert re.fullmatch("[ab]{3}", answer["text"]) and answer["meta_info"]["finish_reason"]["type"] == "stop"


def test_a_grammar_that_cannot_be_read_is_told_and_harms_nobody(server: Running) -> None:
    response = server.post("/v1/completions", {"prompt": "abc", "guided_regex": "(("})
    assert response.status_code == 400 and "unclosed group" in response.json()["error"]["message"]
    assert server.post("/v1/completions", {"prompt": "abc", "max_tokens": 3}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}, "regex": None}, None),
        ({"response_format": {"type": "json_object"}}, ("json_schema", '{"type": "object"}')),
        ({"structured_outputs": {"json_object": True}}, ("json_schema", '{"type": "object"}')),
        ({"structured_outputs": {}}, None),
        ({"structured_outputs": {"json_object": False, "regex": "a"}}, ("regex", "a")),
        ({"guided_json": {"type": "null"}}, ("json_schema", '{"type": "null"}')),
        ({"guided_grammar": "start: /a/"}, ("grammar", "start: /a/")),
    ],
)
def test_fields_become_a_grammar(fields: dict[str, Any], grammar: tuple[str, str] | None) -> None:
    assert grammar_of(fields) == grammar


@pytest.mark.parametrize("value", [{}, {"type": 3}, {"type": "grammar"}])
def test_forms_that_are_not_served_name_those_that_are(value: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="text, json_object and json_schema"):
        grammar_of({"response_format": value})
