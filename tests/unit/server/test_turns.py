"""Later turns of a chat: the ids of earlier answers, and their blocks laid out again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.inference import Request, build_engine
from tests.unit.server.running import MODEL, PROMPT, Running, running_with, tokenizer

NEXT = "Work out A = 5 + 6."
CHAT = "/v1/chat/completions"
TREE = {"return_tree": True}


def ask(server: Running, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    body = {"messages": messages, "temperature": 0, "max_tokens": 700, "return_tokenized_data": True, **fields}
    response = server.post(CHAT, body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def first_turn(server: Running) -> list[dict[str, Any]]:
    user = {"role": "user", "content": PROMPT}
    return [user, ask(server, [user])["message"], {"role": "user", "content": NEXT}]


def test_the_ids_of_an_answer_come_back_as_they_were(server: Running) -> None:
    """Ids that spell the same text in another way stay as they are, and only what follows them is tokenized."""
    user, answer, following = first_turn(server)
    known = [*answer["prompt_token_ids"], *answer["generation_token_ids"]]
    found = ask(server, [user, answer, following])["message"]["prompt_token_ids"]
    assert found[: len(known)] == known and tokenizer().detokenize(found).endswith(NEXT)
    raw = ask(server, [user], return_tokenized_data=False, prevent_retokenization=True, return_raw_text=True)["message"]
    assert raw["generation_token_ids"] == answer["generation_token_ids"], "who wants the ids back needs them first"
    assert raw["raw_text"] == tokenizer().detokenize(known)
    (word,) = tokenizer().tokenize("\n")
    odd = answer | {"generation_token_ids": [*answer["generation_token_ids"], word, word]}
    found = ask(server, [user, odd, following])["message"]["prompt_token_ids"]
    assert found[: len(known) + 2] == [*known, word, word]
    again = ask(server, [user, odd, following], prevent_retokenization=False)["message"]["prompt_token_ids"]
    assert again[: len(known) + 2] != [*known, word, word], "from the text alone"
    assert server.post(CHAT, {"messages": [user, answer | {"generation_token_ids": [10**6]}]}).status_code == 400


def test_blocks_of_earlier_answers_are_laid_out_again(server: Running) -> None:
    """With the ids of the answer and from its text: what an engine writes that is told where it stands."""
    user, answer, following = first_turn(server)
    plain = {"role": "assistant", "content": answer["content"]}
    as_text = ask(server, [user, answer, following], multiverse=TREE)
    prompt = as_text["message"]["prompt_token_ids"]
    assert as_text["multiverse"]["tree"]["position_ids"][0] == len(prompt)
    engine = build_engine(MODEL, tokenizer(), EngineConfig(max_rows=16))
    for message in (answer, plain):
        found = ask(server, [user, message, following], multiverse=TREE | {"replay_structure": True})
        prompt, count = found["message"]["prompt_token_ids"], len(answer["generation_token_ids"])
        # The template of this model puts a newline between turns, which was not there when the answer was written.
        start = len(answer["prompt_token_ids"]) + (message is plain)
        assert prompt[start : start + count] == answer["generation_token_ids"]
        asked = Request(
            prompt_ids=prompt, sampling=SamplingParams(max_tokens=700), replay_structure=((start, start + count),)
        )
        (expected,) = engine.generate([asked])
        tree = found["multiverse"]["tree"]
        assert tree["position_ids"] == expected.position_ids and tree["position_ids"][0] < len(prompt)
        assert tree["token_ids"] == expected.token_ids


def test_routes_without_turns_refuse_to_replay_them(server: Running) -> None:
    for ours in ({"replay_structure": True}, {"separate_reasoning": True}):
        completion = server.post("/v1/completions", {"prompt": "a", "multiverse": ours})
        api = server.http.put("/api", json={"prompts": ["a"], "multiverse": ours})
        assert completion.json()["error"]["param"] == api.json()["error"]["param"] == "multiverse"


TEMPLATE = (
    "{% if greeting %}{{ greeting }}{% endif %}"
    "{% for message in messages %}[{{ message.role }}{{ ':' + message.name if message.name }}"
    "{{ '#' + message.tool_call_id if message.tool_call_id }}]"
    "{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose template closes turns, as those of published models do."""
    with running_with(TEMPLATE, tmp_path_factory.mktemp("template")) as started:
        yield started


def prompt_ids(server: Running, messages: list[dict[str, Any]], **fields: Any) -> list[int]:
    body = {"messages": messages, "max_tokens": 1, "return_token_ids": True, **fields}
    response = server.post(CHAT, body)
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["prompt_token_ids"]
    return ids


def prompt_text(server: Running, messages: list[dict[str, Any]], **fields: Any) -> str:
    return tokenizer().detokenize(prompt_ids(server, messages, **fields))


def test_an_answer_goes_on_from_its_own_ids(templated: Running) -> None:
    """The last turn brings them, and is to be continued: nothing of it is tokenized again, nor closed before it is."""
    user = {"role": "user", "content": PROMPT}
    answer = ask(templated, [user], max_tokens=20, multiverse={"enabled": False})["message"]
    (odd,) = tokenizer().tokenize("\n")
    answer |= {"generation_token_ids": [*answer["generation_token_ids"], odd]}
    known = [*answer["prompt_token_ids"], *answer["generation_token_ids"]]
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    assert prompt_ids(templated, [user, answer], **going_on) == known
    closed = prompt_ids(templated, [user, answer])
    assert closed[: len(known)] == known
    assert tokenizer().detokenize(closed[len(known) :]) == "[end][assistant]"
    assert prompt_text(templated, [user, {"role": "assistant", "content": "so"}], **going_on).endswith("[assistant]so")


def test_what_templates_are_given_holds_for_turns_with_ids_too(templated: Running) -> None:
    user, following = {"role": "user", "content": PROMPT}, {"role": "user", "content": NEXT}
    greeted = {"chat_template_kwargs": {"greeting": "Good day."}}
    answer = ask(templated, [user], max_tokens=20, **greeted)["message"]
    known = [*answer["prompt_token_ids"], *answer["generation_token_ids"]]
    found = prompt_ids(templated, [user, answer, following], **greeted)
    assert found[: len(known)] == known and tokenizer().detokenize(found).startswith("Good day.")


def test_an_empty_answer_brings_no_ids(templated: Running) -> None:
    """It stands nowhere in the text; what came before it keeps its ids."""
    user, following = {"role": "user", "content": PROMPT}, {"role": "user", "content": NEXT}
    (odd,) = tokenizer().tokenize("\n")
    answer = ask(templated, [user], max_tokens=20)["message"]
    known = [*answer["prompt_token_ids"], *answer["generation_token_ids"], odd]
    answer |= {"generation_token_ids": known[len(answer["prompt_token_ids"]) :]}
    empty = {"role": "assistant", "content": "", "prompt_token_ids": [5], "generation_token_ids": []}
    found = prompt_ids(templated, [user, answer, following, empty, following])
    assert found[: len(known)] == known
    rest = f"[end][user]{NEXT}[end][assistant][end][user]{NEXT}[end][assistant]"
    assert tokenizer().detokenize(found[len(known) :]) == rest
    assert prompt_text(templated, [user, empty, following]).count("[assistant]") == 2


def test_templates_see_thoughts_names_and_calls_of_tools(templated: Running, server: Running) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "1 + 2", "name": "Ada", "annotations": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm", "refusal": None, "audio": None},
        {"role": "tool", "content": [{"type": "text", "text": "3"}], "tool_call_id": "c1"},
    ]
    expected = '[user:Ada]1 + 2[end][assistant](hm)add{"a": 1, "b": [2]}[end][tool#c1]3[end][assistant]'
    assert prompt_text(templated, messages) == expected
    thought = messages[1] | {"reasoning": None, "reasoning_content": "hm"}
    assert prompt_text(templated, [messages[0], thought, messages[2]]) == expected
    call["function"]["arguments"] = {"a": 1, "b": [2]}  # type: ignore[index]
    assert prompt_text(templated, messages) == expected
    response = server.post(CHAT, {"messages": messages})
    assert response.status_code == 400 and "does not show" in response.json()["message"], "its template leaves them out"
    half = '{"a": "\\ud800"}'  # escaped in JSON that is a text in JSON
    for wrong in ("[1]", "{", "a", 5, half, '{"\\udc00": 1}', '{"a": NaN}'):
        call["function"]["arguments"] = wrong  # type: ignore[index]
        response = templated.post(CHAT, {"messages": messages})
        assert response.status_code == 400 and response.json()["error"]["param"] == "messages"
    for name in ("arguments", "name"):  # in the body itself
        function = json.dumps({"name": "add", "arguments": {"a": 1}} | {name: "\ud800"})
        content = f'{{"messages": [{{"role": "assistant", "tool_calls": [{{"function": {function}}}]}}]}}'
        response = templated.http.post(CHAT, content=content)
        assert response.status_code == 400 and "half of a character" in response.json()["message"]


def test_what_is_not_served_of_a_turn_or_contradicts_itself_is_named(server: Running) -> None:
    user = {"role": "user", "content": "a"}
    for field, value in (("function_call", {"name": "f"}), ("audio", {"id": "x"}), ("refusal", "no"), ("tools", [{}])):
        response = server.post(CHAT, {"messages": [user | {field: value}]})
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] == "messages" and field in error["message"]
    both = {"continue_final_message": True, "add_generation_prompt": True}
    for path in (CHAT, "/tokenize"):
        response = server.post(path, {"messages": [user], **both})
        assert response.status_code == 400 and response.json()["error"]["param"] == "continue_final_message"
