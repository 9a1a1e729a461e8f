"""`PUT /api` as Megatron's own clients call it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.unit.server.running import PROMPT, Running, tokenizer


def put(server: Running, body: Any) -> Any:
    """What Megatron's command line does: PUT, then JSON."""
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    with urllib.request.urlopen(urllib.request.Request(server.url + "/api", data, headers, method="PUT")) as response:
        return json.loads(response.read())


def test_text_segments_and_tokens_hold_prompt_and_answer(server: Running) -> None:
    answer = put(server, {"prompts": [PROMPT, "Work out A = 1 + 2."], "tokens_to_generate": 600, "top_k": 1})
    assert set(answer) == {"text", "segments", "tokens"}
    assert answer["text"][0].startswith(PROMPT) and "Answer: A = 1550; B = 124" in answer["text"][0]
    assert answer["text"][1].startswith("Work out A = 1 + 2.")
    for text, segments, tokens in zip(answer["text"], answer["segments"], answer["tokens"], strict=True):
        assert "".join(segments) == text == tokenizer().detokenize(tokens)


def test_seeds_are_kept_and_the_tree_comes_only_when_asked(server: Running) -> None:
    body = {"prompts": ["1 + 1"], "tokens_to_generate": 20, "random_seed": 5, "temperature": 1.5}
    first, second = put(server, body), put(server, body | {"multiverse": {}})
    assert first["text"] == second["text"] != put(server, body | {"random_seed": 6})["text"]
    usage = second["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == len(second["tokens"][0])
    assert second["multiverse"][0]["blocks"] == []


def test_fields_that_ask_for_nothing_are_taken(server: Running) -> None:
    """What Megatron's clients send with their defaults."""
    neutral = {
        "top_p_decay": 0.0,
        "top_p_bound": 0.0,
        "stop_on_double_eol": False,
        "prevent_newline_after_colon": False,
    }
    neutral |= {"length_penalty": 1, "top_k": 0, "top_p": 0.0, "temperature": 1.0, "add_BOS": False, "logprobs": False}
    assert put(server, {"prompts": ["1 + 1"], "tokens_to_generate": 2} | neutral)["text"]


def test_stop_token(server: Running) -> None:
    newline = tokenizer().tokenize("\n")[0]
    body = {"prompts": [PROMPT], "tokens_to_generate": 50, "top_k": 1, "stop_token": newline}
    assert put(server, body)["text"][0] == PROMPT + "<Think>\n</Think>", "what was open is closed"


def test_logprobs_and_a_prompt_alone(server: Running) -> None:
    body = {"prompts": ["A = 15"], "tokens_to_generate": 3, "top_k": 1, "logprobs": True}
    answer = put(server, body)
    (logprobs,), (tokens,) = answer["logprobs"], answer["tokens"]
    assert len(logprobs) == len(tokens) - 1 and all(logprob < 0 for logprob in logprobs)
    alone = put(server, body | {"tokens_to_generate": 0})
    assert alone["text"] == ["A = 15"] and alone["logprobs"][0] == logprobs[: len(alone["tokens"][0]) - 1]


def test_stop_on_eol(server: Running) -> None:
    body = {"prompts": [PROMPT + "<Think>\n"], "tokens_to_generate": 50, "top_k": 1, "stop_on_eol": True}
    assert "Let's think in parallel." in put(server, body)["text"][0]
    assert "<Parallel>" not in put(server, body)["text"][0]


def test_errors_are_objects_with_a_message(server: Running) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        put(server, {"prompts": [], "tokens_to_generate": 2})
    assert raised.value.code == 400 and "0 prompts" in json.loads(raised.value.read())["message"]
