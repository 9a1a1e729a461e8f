"""Answers to prompts that end inside of a thought: chat templates that open it, turns that go on in one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_multiverse.inference import Request
from megatron_multiverse.inference.text.state import RequestState
from megatron_multiverse.structure import Thought
from tests.unit.server.running import PROMPT, Running, running_with
from tests.unit.server.tool_samples import ADD, CHAT

OPENING = r"""
{%- for tool in tools or [] %}{{- (tool | tojson) + '\n' }}{%- endfor %}
{%- for message in messages %}
    {%- if message.reasoning_content %}{{- '<Think>' + message.reasoning_content + '</Think>' }}{%- endif %}
    {{- message.content }}
    {%- if not loop.last %}{{- '\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<Think>' if enable_thinking is not defined or enable_thinking else '<Think>\n</Think>' }}
{%- endif %}
"""
"""Opens the thought for the model, or lets it think nothing, as templates of the field do."""
ASKED = [{"role": "user", "content": PROMPT}]
SCHEMA = {
    "type": "object",
    "properties": {"A": {"type": "integer", "minimum": 0, "maximum": 9999}},
    "required": ["A"],
    "additionalProperties": False,
}
IN_JSON = {"response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}}
APART = {"multiverse": {"separate_reasoning": True}}


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_with(OPENING, tmp_path_factory.mktemp("template")) as started:
        yield started


def chat(server: Running, fields: dict[str, Any]) -> dict[str, Any]:
    response = server.post(CHAT, {"messages": ASKED, "temperature": 0} | fields)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def streamed(server: Running, fields: dict[str, Any]) -> tuple[str, str, list[dict[str, Any]]]:
    """(thought, content, deltas) of a stream."""
    response = server.post(CHAT, {"messages": ASKED, "temperature": 0, "stream": True} | fields)
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    thought, content = ("".join(delta.get(name) or "" for delta in deltas) for name in ("reasoning_content", "content"))
    return thought, content, deltas


def test_the_answer_begins_in_the_thought(opening: Running) -> None:
    plain = chat(opening, {})["message"]
    assert "reasoning_content" not in plain and plain["content"].startswith("\nLet's think in parallel.")
    thought, _, answer = plain["content"].partition("</Think>")
    choice = chat(opening, APART)
    assert choice["message"]["reasoning_content"] == thought and choice["message"]["content"] == answer
    assert answer.strip().startswith("Answer: A = 1550") and "<Path>" in thought
    blocks = choice["multiverse"]["blocks"]
    assert len(blocks) == 1 and len(blocks[0]["branches"]) == 2, "blocks in the thought fork"
    assert choice["multiverse"]["malformed"] == {}, "the tag that closes it is in its place"
    assert streamed(opening, APART)[:2] == (thought, answer)
    assert streamed(opening, {})[:2] == ("", plain["content"])
    for theirs in ({"separate_reasoning": True}, {"separate_reasoning": True, "stream_reasoning": True}):
        assert chat(opening, theirs)["message"] == choice["message"], "SGLang's name"
    assert streamed(opening, {"separate_reasoning": True})[:2] == (thought, answer)
    together = chat(opening, IN_JSON | {"separate_reasoning": False})["message"]
    assert together["content"].startswith(f"{thought}</Think>" + "{") and "reasoning_content" not in together


def test_a_model_that_opens_the_thought_again_is_heard_once(opening: Running) -> None:
    start = {"multiverse": {"separate_reasoning": True, "answer_start": "<Think>", "return_tree": True}}
    choice = chat(opening, start)
    message = choice["message"]
    assert (
        "Think>" not in message["reasoning_content"] + message["content"] and "<Path>" in message["reasoning_content"]
    )
    assert choice["multiverse"]["malformed"] == {}
    assert streamed(opening, start)[:2] == (message["reasoning_content"], message["content"])


def test_a_grammar_waits_for_the_end_of_the_thought(opening: Running) -> None:
    message = chat(opening, IN_JSON)["message"]
    assert sorted(json.loads(message["content"])) == ["A"]
    assert "<Path>" in message["reasoning_content"] and "Think>" not in message["reasoning_content"]
    assert streamed(opening, IN_JSON)[:2] == (message["reasoning_content"], message["content"])
    together = chat(opening, IN_JSON | {"multiverse": {"separate_reasoning": False}})["message"]["content"]
    assert together == f"{message['reasoning_content']}</Think>{message['content']}"


def test_where_the_model_ends_its_text_in_the_thought_the_grammar_still_comes(opening: Running) -> None:
    ids = opening.post("/tokenize", {"prompt": "<|endoftext|>"}).json()["tokens"]
    assert len(ids) == 1
    early = {"logit_bias": {str(ids[0]): 100}, "max_tokens": 60}
    message = chat(opening, IN_JSON | early)["message"]
    assert message["reasoning_content"].strip() == "" and sorted(json.loads(message["content"])) == ["A"]
    plain = chat(opening, early)
    assert plain["message"]["content"] == "" and plain["finish_reason"] == "stop", (
        "nothing is put there that none asked"
    )
    strict = {"multiverse": {"on_malformed": "error"}}
    refused = opening.post(CHAT, {"messages": ASKED, "temperature": 0} | IN_JSON | early | strict)
    assert refused.status_code == 422 and "expected </Think>" in refused.json()["message"]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_an_answer_cut_in_the_thought_is_as_long_as_was_asked(opening: Running, most: int) -> None:
    choice = chat(opening, APART | {"max_tokens": most, "return_token_ids": True})
    assert len(choice["token_ids"]) == most and choice["finish_reason"] == "length"
    assert choice["message"]["content"] == "" and "</Think>" not in choice["message"]["reasoning_content"]


def test_required_calls_come_after_the_thought(opening: Running) -> None:
    fields = {"tools": [ADD], "tool_choice": "required", "max_tokens": 520, "multiverse": {}}
    choice = chat(opening, fields)
    message = choice["message"]
    assert "<Path>" in message["reasoning_content"] and len(choice["multiverse"]["blocks"]) == 1
    call = message["tool_calls"][0]["function"]
    assert call["name"] == "add" and choice["finish_reason"] in ("tool_calls", "length")
    thought, content, deltas = streamed(opening, fields)
    assert thought == message["reasoning_content"] and content == (message["content"] or "")
    told = [part for delta in deltas for part in delta.get("tool_calls", []) if part["index"] == 0]
    assert "".join(part["function"].get("arguments", "") for part in told) == call["arguments"]


def test_the_template_decides_whether_the_model_thinks(opening: Running) -> None:
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    message = chat(opening, IN_JSON | off)["message"]
    assert message["reasoning_content"] == "" and sorted(json.loads(message["content"])) == ["A"]
    said = chat(opening, APART | off | {"max_tokens": 5})["message"]
    assert said["content"] and said["reasoning_content"] == ""
    on = {"chat_template_kwargs": {"enable_thinking": True}}
    assert "<Path>" in chat(opening, IN_JSON | on)["message"]["reasoning_content"]


@pytest.mark.parametrize(
    "turn", [{"content": "<Think>\nLet's think"}, {"content": None, "reasoning_content": "\nLet's think"}]
)
def test_a_turn_goes_on_in_the_midst_of_its_thought(opening: Running, turn: dict[str, Any]) -> None:
    goes_on = {"messages": [*ASKED, {"role": "assistant"} | turn], "continue_final_message": True}
    ids = opening.post("/tokenize", goes_on).json()["tokens"]
    assert opening.post("/detokenize", {"tokens": ids}).json()["prompt"] == f"{PROMPT}\n<Think>\nLet's think"
    message = chat(opening, goes_on | IN_JSON)["message"]
    assert message["reasoning_content"].startswith(" in parallel.") and "<Path>" in message["reasoning_content"]
    assert sorted(json.loads(message["content"])) == ["A"]
    assert streamed(opening, goes_on | APART)[0].startswith(" in parallel.")
    ended = [*ASKED, {"role": "assistant", "content": '<Think>\nI know it.\n</Think>{"A":'}]
    rest = chat(opening, goes_on | {"messages": ended, "regex": "[0-9]{1,4}}"})["message"]
    assert rest["reasoning_content"] == "" and sorted(json.loads('{"A":' + rest["content"])) == ["A"]


def test_ids_that_go_on_tell_of_the_thought_that_their_prompt_opened(opening: Running) -> None:
    """The turn's text does not: the tag is in no turn, and the template opens thoughts of new turns alone."""
    kept = chat(opening, APART | {"max_tokens": 9, "prevent_retokenization": True})["message"]
    turn = {name: kept[name] for name in ("role", "prompt_token_ids", "generation_token_ids")}
    whole = chat(opening, IN_JSON)["message"]
    for given in (turn | {"content": kept["reasoning_content"]}, kept):
        goes_on = {"messages": [*ASKED, given], "continue_final_message": True, "return_token_ids": True}
        response = opening.post(CHAT, goes_on | IN_JSON | {"temperature": 0}).json()
        assert response["prompt_token_ids"] == kept["prompt_token_ids"] + kept["generation_token_ids"]
        message = response["choices"][0]["message"]
        assert kept["reasoning_content"] + message["reasoning_content"] == whole["reasoning_content"]
        assert "<Path>" in message["reasoning_content"] and sorted(json.loads(message["content"])) == ["A"]


def test_a_thought_that_no_template_shows_cannot_go_on(server: Running) -> None:
    turns = [*ASKED, {"role": "assistant", "reasoning_content": "\nLet's think"}]
    response = server.post(CHAT, {"messages": turns, "continue_final_message": True})
    assert response.status_code == 400 and response.json()["error"]["param"] == "continue_final_message"
    assert "does not show the thought" in response.json()["message"]
    plain = {"multiverse": {"separate_reasoning": True, "enabled": False}}  # what is open stays so
    kept = chat(server, plain | {"max_tokens": 9, "return_tokenized_data": True})["message"]
    assert kept["content"] == "" and kept["reasoning_content"].startswith("\nLet's think")
    after = chat(server, plain | {"messages": [*ASKED, kept], "continue_final_message": True})["message"]
    whole = chat(server, plain)["message"]
    assert kept["reasoning_content"] + after["reasoning_content"] == whole["reasoning_content"], "from its ids it can"


def test_a_tag_that_a_user_writes_about_opens_no_thought(server: Running) -> None:
    """The template is plain text: nothing but the turns tells who wrote the tag."""
    asked = [{"role": "user", "content": "What does <Think> mean?"}]
    body = {"messages": asked, "logit_bias": {str(tag): -100 for tag in _think_ids(server)}, "max_tokens": 40}
    message = chat(server, body | IN_JSON)["message"]
    assert message["reasoning_content"] == "" and message["content"].startswith('{"A":')


@pytest.mark.parametrize(("end", "thinks"), [("<Think>", True), ("<Think>\nx</Think>\n", False), ("", False)])
def test_prompts_of_other_routes_may_end_in_a_thought(server: Running, end: str, thinks: bool) -> None:
    """As texts and as ids. The grammar says whether the answer was taken to think."""
    bias = {str(tag): -100 for tag in _think_ids(server)} if not thinks else {}
    text = f"{PROMPT}{end}"
    (ids,) = (server.post("/tokenize", {"prompt": text}).json()["tokens"],)
    body = {"max_tokens": 400, "temperature": 0, "regex": "[ab]{3}", "logit_bias": bias, "multiverse": {}}
    for prompt in (text, ids):
        choice = server.post("/v1/completions", body | {"prompt": prompt}).json()["choices"][0]
        _check(choice["text"], choice["multiverse"], thinks=thinks)
    sampling = {name: value for name, value in body.items() if name != "max_tokens"} | {"max_new_tokens": 400}
    for name, prompt in (("text", text), ("input_ids", ids)):
        answer = server.post("/generate", {name: prompt, "sampling_params": sampling}).json()
        _check(answer["text"], answer["multiverse"], thinks=thinks)


def test_a_turn_that_has_ended_thinks_no_more(server: Running) -> None:
    """Ids of a conversation, as trainers send them: what a user wrote of tags ends with the turn."""
    (end,) = server.post("/tokenize", {"prompt": "<|endoftext|>"}).json()["tokens"]
    ids = [*server.post("/tokenize", {"prompt": "Say <Think> a"}).json()["tokens"], end, 7]
    bias = {str(tag): -100 for tag in _think_ids(server)}
    answer = server.post("/v1/completions", {"prompt": ids, "regex": "[ab]{3}", "max_tokens": 30, "logit_bias": bias})
    _check(answer.json()["choices"][0]["text"], None, thinks=False)


def test_the_engine_is_told_of_the_thought_once(opening: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the chat knows of its template reaches the engine's own grammar, and is not guessed anew there."""
    found: list[Thought | None] = []
    take = opening.engine.intake.take

    def watched(request: Request, *others: Any) -> list[RequestState]:
        found.append(request.thought)
        return take(request, *others)

    monkeypatch.setattr(opening.engine.intake, "take", watched)
    chat(opening, {"max_tokens": 2})
    chat(opening, {"max_tokens": 2, "chat_template_kwargs": {"enable_thinking": False}})
    chat(
        opening, {"max_tokens": 2, "messages": [{"role": "user", "content": "<Think>"}], "add_generation_prompt": False}
    )
    assert found == ["open", "closed", "none"]


def _think_ids(server: Running) -> list[int]:
    ids: list[int] = server.post("/tokenize", {"prompt": "<Think>"}).json()["tokens"]
    assert len(ids) == 1
    return ids


def _check(text: str, told: dict[str, Any] | None, *, thinks: bool) -> None:
    thought, tag, said = text.rpartition("</Think>")
    assert bool(tag) == thinks and bool(thought) == thinks and len(said) == 3 and set(said) <= {"a", "b"}, text
    if told is not None:
        assert len(told["blocks"]) == int(thinks) and told["malformed"] == {}
