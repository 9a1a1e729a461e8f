"""What clients of vLLM and SGLang ask for and find in answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.server.running import PROMPT, Running, tokenizer

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": PROMPT}]
GREEDY = {"temperature": 0, "max_tokens": 700}


def answer(server: Running, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def choice(server: Running, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer(server, TEXT, {"prompt": PROMPT, **GREEDY, **fields})["choices"][0]
    return found


def chunks(server: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = server.post(path, body | {"stream": True}).text
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]", text
    return [json.loads(event) for event in events[:-1]]


@pytest.mark.parametrize(
    ("fields", "reason", "finish"),
    [
        ({}, None, "stop"),
        ({"stop": ["nowhere", "in parallel"]}, "in parallel", "stop"),
        ({"stop_token_ids": tokenizer().tokenize(".")}, tokenizer().tokenize(".")[0], "stop"),
        ({"max_tokens": 9}, None, "length"),
        ({"max_tokens": 0, "echo": True, "logit_bias": {str(tokenizer().tokenize(".")[0]): 100}}, None, "length"),
    ],
    ids=["end of text", "text", "token", "budget", "prompt alone"],
)
def test_what_ended_an_answer_stands_beside_why(
    server: Running, fields: dict[str, Any], reason: object, finish: str
) -> None:
    if fields.get("max_tokens") == 0:
        fields = fields | {"stop_token_ids": tokenizer().tokenize(".")}  # it is drawn, and left out
    found = choice(server, **fields)
    assert (found["stop_reason"], found["finish_reason"]) == (reason, finish)
    if fields.get("max_tokens") != 0:
        message = answer(server, CHAT, {"messages": MESSAGES, **GREEDY, **fields})["choices"][0]
        assert (message["stop_reason"], message["finish_reason"]) == (reason, finish)
        told = [one["choices"][0] for one in chunks(server, TEXT, {"prompt": PROMPT, **GREEDY, **fields})]
        assert [one["stop_reason"] for one in told] == [None] * (len(told) - 1) + [reason]


@pytest.mark.parametrize(
    ("stop", "in_paths"),
    [
        ("in parallel", False),
        ("50; B", True),
        *((stop, in_paths) for stop in ("carry 1, l", ["124", "nowhere"]) for in_paths in (True, False)),
    ],
    ids=str,
)
def test_stop_texts_stay_where_they_are_asked_for(server: Running, stop: str | list[str], in_paths: bool) -> None:
    """Whole and streamed; what follows a stop text in its last token is left out as ever."""
    ours: dict[str, Any] = {"stop_in_branches": in_paths}
    without = choice(server, stop=stop, multiverse=ours | {"return_tree": True})
    stops = without["multiverse"]["tree"]["stops"]
    whole = choice(server, stop=stop, multiverse=ours, include_stop_str_in_output=True)
    assert choice(server, stop=stop, multiverse=ours, no_stop_trim=True)["text"] == whole["text"]
    assert len(whole["text"]) == len(without["text"]) + sum(len(match["text"]) for match in stops)
    assert all(match["text"] in whole["text"] for match in stops)
    assert bool(stops) == (in_paths or stop != "carry 1, l"), "which stands in a path alone"
    told: dict[str, list[str]] = {}
    for mode in ("linear", "branches"):
        body = {"prompt": PROMPT, **GREEDY, "stop": stop, "include_stop_str_in_output": True}
        body["multiverse"] = ours | {"stream_mode": mode}
        told[mode] = [one["choices"][0]["text"] for one in chunks(server, TEXT, body)]
    assert "".join(told["linear"]) == whole["text"]
    assert sum(len(text) for text in told["branches"]) == len(whole["text"])


def test_stop_tokens_are_no_text_that_could_stay(server: Running) -> None:
    for name in ("include_stop_str_in_output", "no_stop_trim"):
        response = server.post(TEXT, {"prompt": "a", "stop_token_ids": [5], name: True})
        assert response.status_code == 400 and response.json()["error"]["param"] == name


@pytest.mark.parametrize("mode", ["linear", "branches"])
def test_ids_stand_beside_the_text_where_vllm_has_them(server: Running, mode: str) -> None:
    prompts = [PROMPT, "Work out A = 1 + 2."]
    body = {"prompt": prompts, "max_tokens": 200, "n": 2, "temperature": 1, "seed": 4, "return_token_ids": True}
    body["multiverse"] = {"stream_mode": mode}
    found = answer(server, TEXT, body)
    assert "prompt_token_ids" not in found
    for index, one in enumerate(found["choices"]):
        assert one["prompt_token_ids"] == tokenizer().tokenize(prompts[index // 2])
        assert tokenizer().detokenize(one["token_ids"]) == one["text"]
    told: dict[int, list[int]] = {}
    for one in (chunk["choices"][0] for chunk in chunks(server, TEXT, body)):
        assert ("prompt_token_ids" in one) == (one["index"] not in told), "in the first chunk alone"
        told.setdefault(one["index"], []).extend(one["token_ids"])
    order = list if mode == "linear" else sorted
    assert [order(told[index]) for index in range(4)] == [order(one["token_ids"]) for one in found["choices"]]

    body = {"messages": MESSAGES, **GREEDY, "return_token_ids": True, "multiverse": {"stream_mode": mode}}
    found = answer(server, CHAT, body)
    (one,) = found["choices"]
    assert "prompt_token_ids" not in one and found["prompt_token_ids"] == tokenizer().tokenize(PROMPT)
    assert tokenizer().detokenize(one["token_ids"]) == one["message"]["content"]
    first, *others = chunks(server, CHAT, body)
    assert first["prompt_token_ids"] == found["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in others)
    ids = [token for chunk in (first, *others) for token in chunk["choices"][0]["token_ids"]]
    assert order(ids) == order(one["token_ids"])
    assert "token_ids" not in choice(server), "not unasked"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_name_tokens_by_their_ids_if_asked(server: Running, stream: bool) -> None:
    """Texts of several tokens can be alike; where in the text they stand is told of their texts all the same."""

    def told(path: str, body: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
        body = body | fields | GREEDY
        answers = chunks(server, path, body) if stream else [answer(server, path, body)]
        return [answered["choices"][0]["logprobs"] for answered in answers if answered["choices"][0]["logprobs"]]

    def joined(entries: list[dict[str, Any]], name: str) -> list[Any]:
        return [one for entry in entries for one in entry[name]]

    def id_of(name: str) -> int:
        assert name.startswith("token_id:")
        return int(name.removeprefix("token_id:"))

    text = {"prompt": PROMPT, "logprobs": 2, "multiverse": {}}
    plain, named = told(TEXT, text), told(TEXT, text, return_tokens_as_token_ids=True)
    texts = tokenizer().id_to_text
    assert [texts[id_of(name)] for name in joined(named, "tokens")] == joined(plain, "tokens")
    for name in ("text_offset", "token_logprobs"):
        assert joined(named, name) == joined(plain, name)
    tops = zip(joined(named, "tokens"), joined(named, "top_logprobs"), joined(named, "token_logprobs"), strict=True)
    assert all(logprob is None or top[token] == logprob for token, top, logprob in tops)

    chat = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    plain, named = told(CHAT, chat), told(CHAT, chat, return_tokens_as_token_ids=True)
    for one, other in zip(joined(plain, "content"), joined(named, "content"), strict=True):
        assert [texts[id_of(e["token"])] for e in (other, *other["top_logprobs"])] == [
            e["token"] for e in (one, *one["top_logprobs"])
        ]
        assert other["bytes"] == one["bytes"] == list(one["token"].encode())


def test_names_of_sglang_count_in_its_sampling_parameters(server: Running) -> None:
    def ids(**sampling: Any) -> list[int]:
        body = {"text": "abc", "sampling_params": {"max_new_tokens": 60, **sampling}}
        found: list[int] = answer(server, "/generate", body)["output_ids"]
        return found

    assert ids(sampling_seed=7, temperature=2) == ids(seed=7, temperature=2) != ids(sampling_seed=8, temperature=2)
    (end,) = tokenizer().tokenize("<|endoftext|>")
    bias = {"logit_bias": {str(end): 100}, "temperature": 0}
    assert ids(**bias) == [] and len(ids(**bias, min_new_tokens=12)) >= 12
    for name in ("max_tokens", "max_completion_tokens", "logprobs"):
        response = server.post("/generate", {"text": "a", "sampling_params": {name: 5}})
        assert response.status_code == 400 and response.json()["error"]["param"] == name
        assert "max_new_tokens" in response.json()["message"]


def test_texts_in_log_probabilities(server: Running) -> None:
    body = {"text": PROMPT, "sampling_params": {"max_new_tokens": 300, "temperature": 0}}
    nothing = dict.fromkeys(["return_logprob", "top_logprobs_num", "return_text_in_logprobs", "rid", "input_ids"])
    assert "output_token_logprobs" not in answer(server, "/generate", body | nothing)["meta_info"]
    body |= {"return_logprob": True, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    found = answer(server, "/generate", body)
    facts = found["meta_info"]
    assert "".join(text for _, _, text in facts["output_token_logprobs"]) == found["text"]
    for chosen, top in zip(facts["output_token_logprobs"], facts["output_top_logprobs"], strict=True):
        assert top is None if chosen[0] is None else chosen in top


def test_salts_of_generate_keep_prompts_apart(server: Running) -> None:
    prompt = f"Only this test begins like this. {PROMPT}"

    def cached(**fields: Any) -> int:
        body = {"text": prompt, "sampling_params": {"max_new_tokens": 1}, **fields}
        found: int = answer(server, "/generate", body)["meta_info"]["cached_tokens"]
        return found

    salts: list[dict[str, Any]] = [{"cache_salt": "a"}, {"extra_key": "a"}, {"cache_salt": "a", "extra_key": "b"}]
    assert [cached(**salt) for salt in salts] == [0, 0, 0]
    assert all(cached(**salt) > 0 for salt in salts)
    used = answer(server, TEXT, {"prompt": prompt, "max_tokens": 1, "cache_salt": "a", "extra_key": "b"})["usage"]
    assert used["prompt_tokens_details"]["cached_tokens"] > 0, "routes share what has the same salts"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text": ""}, "text: an empty prompt; give at least one token"),
        ({"input_ids": [10**6]}, "input_ids: 1000000 is no token id; the vocabulary has 0 to 295"),
        ({"text": "a", "top_logprobs_num": 21}, "top_logprobs_num: 21 asked for, at most 20 are allowed"),
        ({}, "input_ids: give either text or input_ids; neither is given"),
    ],
    ids=["text", "ids", "alternatives", "nothing"],
)
def test_faults_of_generate_are_named_as_its_body_has_them(server: Running, body: dict[str, Any], message: str) -> None:
    assert server.post("/generate", body).json()["message"] == message


def test_a_chat_is_tokenized_as_it_is_read(server: Running) -> None:
    answered = [*MESSAGES, {"role": "assistant", "content": "<Think>\nLet's"}]
    for messages, options in ((MESSAGES, {}), (answered, {}), (answered, {"continue_final_message": True})):
        found = answer(server, "/tokenize", {"messages": messages, "return_token_strs": True, **options})
        body = {"messages": messages, "max_tokens": 5, "return_token_ids": True, **options}
        assert found["tokens"] == answer(server, CHAT, body)["prompt_token_ids"]
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert "".join(found["token_strs"]) == tokenizer().detokenize(found["tokens"])
    assert "token_strs" not in answer(server, "/tokenize", {"prompt": "a"})
    whole = {"temperature": 0.5, "max_tokens": 5, "seed": 1, "stream": True}  # what draws an answer changes no prompt
    assert answer(server, "/tokenize", {"messages": MESSAGES} | whole) == answer(
        server, "/tokenize", {"messages": MESSAGES}
    )
    for body, param in (
        ({}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
        ({"messages": MESSAGES, "add_BOS": True}, "add_BOS"),
        ({"prompt": "a", "add_BOS": True}, "add_BOS"),
        ({"messages": MESSAGES, "documents": [{"text": "b"}]}, "documents"),
        ({"messages": MESSAGES, "reasoning_effort": "low"}, "reasoning_effort"),
        ({"messages": MESSAGES, "truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
        ({"messages": MESSAGES, "text": "b"}, "text"),
    ):
        response = server.post("/tokenize", body)
        assert response.status_code == 400 and response.json()["error"]["param"] == param
