"""Whatever a client sends, it gets one error object with the right status, and the server goes on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import socket
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError, model_validator
from starlette.requests import Request

from megatron_multiverse.server import refused
from megatron_multiverse.server.body import Fields, read_fields
from megatron_multiverse.server.config import LimitConfig
from megatron_multiverse.server.errors import ApiError
from megatron_multiverse.server.messages import Message
from megatron_multiverse.server.refused import REFUSED
from megatron_multiverse.server.routes import chat, completions, megatron, rollout
from tests.unit.server.running import PROMPT, Running, running
from tests.waiting import PATIENCE_S

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "1 + 1"}]


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The object, which every error has, and nothing else beside the text for Megatron's clients."""
    body = response.json()
    assert set(body) == {"message", "error"} and body["message"] == body["error"]["message"] != ""
    assert set(body["error"]) == {"message", "type", "code", "param"} and isinstance(body["error"]["type"], str)
    return body["error"]


FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [[]]}, "prompt"),
    (TEXT, {"prompt": ["a", 1]}, "prompt"),
    (TEXT, {"prompt": [0, 10**6]}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": ["a"] * 129}, "prompt"),
    (TEXT, {"prompt": "a", "max_tokens": True}, "max_tokens"),
    (TEXT, {"prompt": "a", "max_tokens": -1}, "max_tokens"),
    (TEXT, {"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
    (TEXT, {"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    (TEXT, {"prompt": "a", "max_tokens": 2**40}, "max_tokens"),
    (TEXT, {"prompt": "a", "temperature": -0.1}, "temperature"),
    (TEXT, {"prompt": "a", "temperature": "hot"}, "temperature"),
    (TEXT, {"prompt": "a", "top_p": 1.1}, "top_p"),
    (TEXT, {"prompt": "a", "top_k": -2}, "top_k"),
    (TEXT, {"prompt": "a", "n": 0}, "n"),
    (TEXT, {"prompt": "a", "n": 17}, "n"),
    (TEXT, {"prompt": "a", "best_of": 2}, "best_of"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
    (TEXT, {"prompt": "a", "priority": "high"}, "priority"),
    (TEXT, {"prompt": "a", "return_token_ids": 1}, "return_token_ids"),
    (TEXT, {"prompt": "a", "structural_tag": "{}"}, "structural_tag"),
    (TEXT, {"prompt": "a", "watermarking": True}, "watermarking"),
    (CHAT, {"messages": MESSAGES, "input_ids": [1]}, "input_ids"),
    (CHAT, {"messages": MESSAGES, "reasoning": {"effort": "low"}}, "reasoning"),
    (CHAT, {"messages": MESSAGES, "documents": [{"text": "b"}]}, "documents"),
    (CHAT, {"messages": MESSAGES, "chat_template": "{{ messages }}"}, "chat_template"),
    (TEXT, {"prompt": "a", "seed": 2**63}, "seed"),
    (TEXT, {"prompt": "a", "stop": ["x"] * 17}, "stop"),
    (TEXT, {"prompt": "a", "stop": "x" * 257}, "stop"),
    (TEXT, {"prompt": "a", "stop": [""]}, "stop"),
    (TEXT, {"prompt": "a", "stop_token_ids": [10**6]}, "stop_token_ids"),
    (TEXT, {"prompt": "a", "stream": "yes"}, "stream"),
    (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (TEXT, {"prompt": "a", "logprobs": 1, "echo": True, "stream": True}, "logprobs"),
    (TEXT, {"prompt": "a", "multiverse": {"on_malformed": "stop"}}, "multiverse"),
    (TEXT, {"prompt": "a", "multiverse": {"on_malformed": "error", "enabled": False}}, "on_malformed"),
    (TEXT, {"prompt": "a", "multiverse": {"on_malformed": "error", "commit_after": 1}}, "on_malformed"),
    (TEXT, {"prompt": "a", "multiverse": {"branch_max_tokens": 1}}, "multiverse"),
    (TEXT, {"prompt": "a", "multiverse": {"answer_start": "b", "enabled": False}}, "answer_start"),
    (TEXT, {"prompt": "a", "min_p": 1.5}, "min_p"),
    (TEXT, {"prompt": "a", "min_tokens": 20, "max_tokens": 10}, "min_tokens"),
    (TEXT, {"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
    (TEXT, {"prompt": "a", "frequency_penalty": -3}, "frequency_penalty"),
    (TEXT, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    (TEXT, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    (TEXT, {"prompt": "a", "logit_bias": {"1000000": 1}}, "logit_bias"),
    (TEXT, {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias"),
    (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (TEXT, {"prompt": "a", "stream": True, "multiverse": {"commit_after": 1}}, "multiverse"),
    (TEXT, {"prompt": "a", "multiverse": {"commit_on": "x"}}, "commit_on"),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (TEXT, {"prompt": "a", "multiverse": {"max_depth": -1}}, "multiverse"),
    (TEXT, {"prompt": "a", "multiverse": {"stream_mode": "tree"}}, "multiverse"),
    (TEXT, {"prompt": "a", "debug_fname": "/tmp/x"}, "debug_fname"),
    (TEXT, {"prompt": "a", "multiverse": {"separate_reasoning": True}}, "multiverse"),
    (CHAT, {"messages": MESSAGES, "add_BOS": True}, "add_BOS"),
    (CHAT, {"messages": MESSAGES, "skip_prompt_log_probs": False}, "skip_prompt_log_probs"),
    (CHAT, {"messages": MESSAGES, "return_raw_text": True, "stream": True}, "return_raw_text"),
    (CHAT, {"messages": MESSAGES, "return_tokenized_data": True, "stream": True}, "return_tokenized_data"),
    (
        CHAT,
        {"messages": MESSAGES, "stream": True, "multiverse": {"separate_reasoning": True, "stream_mode": "branches"}},
        "multiverse",
    ),
    (
        CHAT,
        {"messages": MESSAGES, "stream": True, "separate_reasoning": True, "multiverse": {"stream_mode": "branches"}},
        "multiverse",
    ),
    (
        CHAT,
        {"messages": MESSAGES, "separate_reasoning": True, "multiverse": {"separate_reasoning": False}},
        "separate_reasoning",
    ),
    (CHAT, {"messages": MESSAGES, "separate_reasoning": True, "logprobs": True}, "logprobs"),
    (CHAT, {"messages": MESSAGES, "stream_reasoning": False}, "stream_reasoning"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"content": "no role"}]}, "messages"),
    (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "structural_tag"}}, "response_format"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"}, "logprobs": True}, "logprobs"),
    (TEXT, {"prompt": "a", "structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
    (TEXT, {"prompt": "a", "structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
    (TEXT, {"prompt": "a", "structured_outputs": {"choice": []}}, "structured_outputs"),
    (TEXT, {"prompt": "a", "structured_outputs": {"regex": 4}}, "structured_outputs"),
    (TEXT, {"prompt": "a", "guided_regex": "a", "regex": "b"}, "regex"),
    (TEXT, {"prompt": "a", "guided_regex": "a" * 70_000}, "guided_regex"),
    (TEXT, {"prompt": "a", "regex": "a", "min_tokens": 2}, "grammar"),
    (TEXT, {"prompt": "a", "regex": "a", "ignore_eos": True}, "grammar"),
    (CHAT, {"messages": MESSAGES, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
    (
        CHAT,
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
            ]
        },
        "messages",
    ),
]


@pytest.mark.parametrize(("path", "body", "param"), FIELDS, ids=[f"{k}-{case[2]}" for k, case in enumerate(FIELDS)])
def test_wrong_fields_are_named(server: Running, path: str, body: dict[str, Any], param: str) -> None:
    response = server.post(path, body)
    error = error_of(response)
    assert response.status_code == 400 and error["param"] == param and error["type"] == "invalid_request_error"
    assert error["message"].startswith(param)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": None}, "prompt: Input should be a valid string or a valid list (got null)"),
        ({"prompt": ["a", 1]}, "prompt.1: Input should be a valid string (got 1)"),
        ({"prompt": [1, "a"]}, 'prompt.1: Input should be a valid integer (got "a")'),
        ({"prompt": [[1], [2, None]]}, "prompt.1.1: Input should be a valid integer (got null)"),
        ({"prompt": "a", "stop": 5}, "stop: Input should be a valid string or a valid list (got 5)"),
        ({"prompt": "a", "multiverse": []}, "multiverse: Input should be an object (got [])"),
        ({"prompt": "a", "logit_bias": [1]}, "logit_bias: Input should be an object (got [1])"),
    ],
)
def test_messages_name_fields_and_no_types_of_ours(server: Running, body: dict[str, Any], message: str) -> None:
    assert error_of(server.post(TEXT, body))["message"] == message


API: list[tuple[dict[str, Any], str]] = [
    ({}, "prompts"),
    ({"prompts": "a"}, "prompts"),
    ({"prompts": []}, "prompts"),
    ({"prompts": [""]}, "prompts"),
    ({"prompts": ["a"] * 129}, "prompts"),
    ({"prompts": ["a"], "tokens_to_generate": -1}, "tokens_to_generate"),
    ({"prompts": ["a"], "tokens_to_generate": 0}, "tokens_to_generate"),
    ({"prompts": ["a"], "temperature": 0}, "temperature"),
    ({"prompts": ["a"], "temperature": 101}, "temperature"),
    ({"prompts": ["a"], "top_k": 1001}, "top_k"),
    ({"prompts": ["a"], "top_p": 1.5}, "top_p"),
    ({"prompts": ["a"], "add_BOS": True}, "add_BOS"),
    ({"prompts": ["a"], "random_seed": -1}, "random_seed"),
    ({"prompts": ["a"], "max_len": 10}, "max_len"),
    ({"prompts": ["a"], "sentences": ["a"]}, "sentences"),
    ({"prompts": ["a"], "beam_width": 1}, "beam_width"),
    ({"prompts": ["a"], "top_p_decay": 0.5}, "top_p_decay"),
    ({"prompts": ["a"], "prevent_newline_after_colon": True}, "prevent_newline_after_colon"),
    ({"prompts": ["a"], "length_penalty": 2.0}, "length_penalty"),
    ({"prompts": ["a"], "stop_token": 10**6}, "stop_token"),
]


@pytest.mark.parametrize(("body", "param"), API, ids=[f"{k}-{case[1]}" for k, case in enumerate(API)])
def test_wrong_fields_of_megatron_are_named(server: Running, body: dict[str, Any], param: str) -> None:
    response = server.http.put("/api", json=body)
    assert response.status_code == 400 and error_of(response)["param"] == param


BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a"} trailing',
    b"prompt=a&max_tokens=5",
    b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07example\x94.",  # a pickle
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_bodies_that_are_no_json_object(server: Running, body: bytes) -> None:
    for path in (TEXT, CHAT, "/tokenize", "/detokenize"):
        response = server.http.post(path, content=body)
        assert response.status_code == 400 and len(error_of(response)["message"]) < 300


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": "a",\n "n": tru}', "the body is no JSON: expected ident at line 2"),
        (b'{"prompt": "a", "n": NaN}', "no JSON: expected value at line 1 column 22"),
        (b'{"prompt": "a"} x', "no JSON: trailing characters at line 1"),
        (b'{"prompt": ' + b"[" * 201 + b"]" * 201 + b"}", "its numbers or its nesting are too large"),
        (b'{"n": 1' + b"0" * 5000 + b"}", "its numbers or its nesting are too large"),
        (b'{"prompt": "\\ud800"}', "half of a character"),
        (b'{"prompt": "\\udc00 a"}', "half of a character"),
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
        (b"[1]", "must be a JSON object, got a list"),
    ],
)
def test_a_body_that_is_no_json_is_told_where(body: bytes, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        asyncio.run(read_fields(request_of(body), Fields))
    assert caught.value.status == 400 and message in caught.value.message


@pytest.mark.parametrize("count", [1, 100_000])
def test_ids_that_the_vocabulary_does_not_have_are_found_in_prompts_of_any_length(server: Running, count: int) -> None:
    response = server.post(TEXT, {"prompt": [[5], [7] * count + [10**6] + [5]]})
    assert response.status_code == 400 and "1000000 is no token id" in error_of(response)["message"]


def test_large_bodies_are_read_without_collections() -> None:
    """Each would look at all objects of the body again, while all streams wait."""
    body = b'{"prompt": "a", "others": [' + b"[]," * 100_000 + b"[]]}"
    collections: list[str] = []

    def watch(phase: str, info: dict[str, int]) -> None:
        collections.append(phase)

    class Watched(Fields):
        @model_validator(mode="after")
        def over(self) -> Watched:
            collections.append("read")
            return self

    gc.callbacks.append(watch)
    try:
        fields = asyncio.run(read_fields(request_of(body), Watched))
        with pytest.raises(ApiError):
            asyncio.run(read_fields(request_of(body[:-1]), Watched))
    finally:
        gc.callbacks.remove(watch)
    assert len((fields.model_extra or {})["others"]) == 100_001 and gc.isenabled()
    assert collections[: collections.index("read")].count("start") < 10, "else some hundred"


def request_of(body: bytes) -> Request:
    """A request with this body."""
    app = SimpleNamespace(state=SimpleNamespace(config=SimpleNamespace(limits=LimitConfig())))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request({"type": "http", "headers": [], "app": app}, receive)


def test_a_json_body_needs_no_content_type(server: Running) -> None:
    body = json.dumps({"prompt": "1 + 1", "max_tokens": 2}).encode()
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}):
        assert server.http.post(TEXT, content=body, headers=headers).status_code == 200


def test_routes_and_methods_that_are_not_there(server: Running) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/start_profile", 404),
        ("GET", TEXT, 405),
        ("POST", "/api", 405),
        ("PUT", CHAT, 405),
        ("DELETE", "/v1/models", 405),
    ):
        response = server.http.request(method, path)
        assert response.status_code == status
        error_of(response)


def test_another_model_is_not_found(server: Running) -> None:
    for path, body in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": MESSAGES}), ("/tokenize", {"prompt": "a"})):
        response = server.post(path, body | {"model": "gpt-4"})
        assert response.status_code == 404 and error_of(response)["code"] == "model_not_found"
        for name in ("EMPTY", server.app.state.model.name):
            assert server.post(path, body | {"model": name, "max_tokens": 1}).status_code == 200


def test_what_the_cache_cannot_hold_is_refused_with_the_numbers(server: Running) -> None:
    response = server.post(TEXT, {"prompt": PROMPT, "max_tokens": 10**6})
    assert response.status_code == 400 and "1000000" in error_of(response)["message"]
    assert error_of(response)["code"] == "context_length_exceeded", "as OpenAI calls it; agents shorten the prompt then"
    response = server.post(TEXT, {"prompt": [1] * 5000, "max_tokens": 1})
    assert response.status_code == 400 and "5000" in error_of(response)["message"]
    response = server.post(TEXT, {"prompt": [1] * 5000, "max_tokens": 1, "stream": True})
    assert response.status_code == 400, "a stream that cannot start is no stream"
    assert error_of(response)["code"] == "context_length_exceeded"
    response = server.post(TEXT, {"prompt": PROMPT, "max_tokens": 5, "stop": "</Goal>"})
    assert response.status_code == 400 and error_of(response)["code"] == "invalid_value"
    server.wait_until_free()


def test_what_can_never_be_held_does_not_reach_the_engine(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read millions of ids between two steps, while all others wait."""
    monkeypatch.setattr(server.host, "_add", lambda message: pytest.fail("it was told of it"))
    for path, body in (
        (TEXT, {"prompt": [5] * 100_000}),
        (TEXT, {"prompt": ["a", "a" * 100_000], "stream": True}),
        (TEXT, {"prompt": "a", "max_tokens": 10**6}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 100_000}]}),
        ("/generate", {"input_ids": [5] * 100_000}),
    ):
        response = server.post(path, body)
        assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"
    response = server.http.put("/api", json={"prompts": ["a" * 100_000]})
    assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"


def test_a_contradiction_of_a_chat_does_not_reach_the_engine(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the thought comes apart is asked first where an answer is written, when all of it has been drawn."""
    told: list[Any] = []
    add = server.host._add
    monkeypatch.setattr(server.host, "_add", lambda message: (told.append(message), add(message)))
    body = {"messages": MESSAGES, "max_tokens": 1, "separate_reasoning": True}
    assert server.post(CHAT, body).status_code == 200 and len(told) == 1
    for stream in (False, True):
        contradicting = body | {"stream": stream, "multiverse": {"separate_reasoning": False}}
        response = server.post(CHAT, contradicting)
        assert response.status_code == 400 and error_of(response)["param"] == "separate_reasoning"
    assert len(told) == 1


def test_a_long_prompt_of_ids_is_told_from_other_kinds_at_its_first_entry() -> None:
    """Every kind of list that it is not would else write a fault for each id."""
    with pytest.raises(ValidationError) as raised:
        completions.CompletionFields.model_validate({"prompt": [5] * 1000 + [None]})
    assert raised.value.error_count() == 4


MEGATRON_FIELDS = {
    "api": """prompts tokens_to_generate temperature top_k top_p top_p_decay top_p_bound logprobs add_BOS stop_on_eol
        stop_on_double_eol prevent_newline_after_colon random_seed stop_token length_penalty max_len sentences
        beam_width""",
    "completions": """prompt model max_tokens temperature top_p top_k n seed best_of logprobs echo stop stream
        stream_options ignore_eos streaming_interval multi_modal_data debug_fname""",
    "chat": """messages model max_completion_tokens max_tokens temperature top_p top_k n seed logprobs top_logprobs stop
        stream stream_options tools tool_choice parallel_tool_calls chat_template_kwargs ignore_eos add_BOS
        skip_prompt_log_probs return_tokenized_data return_raw_text prevent_retokenization streaming_interval""",
}
"""What Megatron's text-generation servers read, the static one and the dynamic one up to 0.19."""


COMMON_FIELDS = """model temperature top_p top_k n seed stop stream stream_options ignore_eos frequency_penalty
    presence_penalty repetition_penalty logit_bias min_p min_tokens stop_token_ids
    include_stop_str_in_output no_stop_trim use_beam_search length_penalty truncate_prompt_tokens
    prompt_logprobs logprobs allowed_token_ids bad_words response_format structured_outputs
    structural_tag json_schema regex ebnf stop_regex priority return_token_ids
    return_tokens_as_token_ids return_prompt_token_ids return_meta_info return_cached_tokens_details
    cache_salt extra_key kv_transfer_params ec_transfer_params vllm_xargs custom_params
    repetition_detection logprob_token_ids lora_path session_params return_hidden_states
    return_routed_experts custom_logit_processor add_special_tokens thinking_token_budget
    watermarking stream_interval images_config media_io_kwargs"""

PEERS_FIELDS = {
    "completions": COMMON_FIELDS
    + " prompt max_tokens best_of echo suffix prompt_embeds logits_processors multi_modal_data",
    "chat": COMMON_FIELDS
    + """ messages max_completion_tokens max_tokens top_logprobs tools tool_choice parallel_tool_calls functions
        function_call modalities audio prediction reasoning_effort reasoning thinking task verbosity web_search_options
        moderation chat_template chat_template_kwargs documents echo add_generation_prompt continue_final_message
        mm_processor_kwargs include_reasoning separate_reasoning stream_reasoning input_ids return_prompt_text""",
    "message": """role content name reasoning reasoning_content tool_calls tool_call_id refusal audio function_call
        tools""",
    "generate": """text input_ids sampling_params return_logprob top_logprobs_num return_text_in_logprobs rid stream
        logprob_start_len image_data audio_data video_data input_embeds token_ids_logprob lora_path cache_salt extra_key
        custom_logit_processor session_params return_hidden_states return_routed_experts return_prompt_token_ids
        return_entropy return_sampling_mask return_indexer_topk return_flat_raw_top_logprobs max_thinking_tokens
        positional_embed_overrides priority""",
    "sampling": """max_new_tokens stop stop_token_ids stop_regex temperature top_p top_k min_p frequency_penalty
        presence_penalty repetition_penalty min_new_tokens n json_schema regex ebnf structural_tag ignore_eos
        no_stop_trim custom_params stream_interval logit_bias sampling_seed beam_width""",
}
"""Fields of OpenAI, vLLM and SGLang that change what an answer says or holds."""


def test_every_field_of_peers_that_changes_an_answer_is_honoured_or_refused() -> None:
    for name, known in {
        "completions": completions.CompletionFields.model_fields.keys() | REFUSED.keys(),
        "chat": chat.ChatFields.model_fields.keys() | REFUSED.keys() | refused.CHAT.keys(),
        "message": Message.model_fields.keys() | refused.MESSAGE.keys(),
        "generate": rollout.GenerateFields.model_fields.keys() | REFUSED.keys() | refused.GENERATE.keys(),
        "sampling": rollout.SamplingFields.model_fields.keys() | REFUSED.keys() | refused.SAMPLING.keys(),
    }.items():
        assert set(PEERS_FIELDS[name].split()) <= known, name


def test_every_field_of_megatrons_servers_is_honoured_or_refused() -> None:
    for name, known in {
        "api": megatron.ApiFields.model_fields.keys() | REFUSED.keys() | refused.API.keys(),
        "completions": completions.CompletionFields.model_fields.keys() | REFUSED.keys(),
        "chat": chat.ChatFields.model_fields.keys() | REFUSED.keys() | refused.CHAT.keys(),
    }.items():
        assert set(MEGATRON_FIELDS[name].split()) <= known, name


WITHOUT_EFFECT = {"model", "user", "stream_options", "priority", "rid"}
"""Fields that change no answer: where a route does not have them, they are ignored."""


def test_every_field_of_one_route_is_known_to_the_others() -> None:
    kinds = (completions.CompletionFields, chat.ChatFields, megatron.ApiFields, rollout.GenerateFields)
    taken = {name for kind in (*kinds, rollout.SamplingFields) for name in kind.model_fields}
    assert refused.ELSEWHERE.keys() == taken - WITHOUT_EFFECT
    assert {other for name, others in refused.ALIKE.items() for other in (name, *others)} <= refused.ELSEWHERE.keys()


BODY_OF: dict[str, dict[str, Any]] = {
    TEXT: {"prompt": "a", "max_tokens": 1},
    CHAT: {"messages": MESSAGES, "max_tokens": 1},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 1}},
    "/api": {"prompts": ["a"], "tokens_to_generate": 1},
    "/tokenize": {"messages": MESSAGES},
}
"""That each route serves."""


def sent(server: Running, path: str, fields: dict[str, Any]) -> httpx2.Response:
    return server.http.request("PUT" if path == "/api" else "POST", path, json=BODY_OF[path] | fields)


@pytest.mark.parametrize("path", BODY_OF)
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_route_serves_is_refused_by_all(server: Running, path: str, name: str) -> None:
    response = sent(server, path, {name: "x"})
    assert response.status_code == 400 and error_of(response)["param"] == name
    assert error_of(response)["code"] == "unsupported_parameter"
    for neutral in (None, *REFUSED[name]):
        assert sent(server, path, {name: neutral}).status_code == 200


@pytest.mark.parametrize("name", ["cache_salt", "extra_key"])
def test_a_prefix_cache_of_its_own_is_not_promised_where_there_is_none(server: Running, name: str) -> None:
    assert error_of(sent(server, "/api", {name: "a"}))["param"] == name
    assert sent(server, TEXT, {name: "a"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "name", "value", "has"),
    [
        (TEXT, "max_completion_tokens", 5, "max_tokens"),
        (TEXT, "tokens_to_generate", 5, "max_tokens"),
        (TEXT, "messages", MESSAGES, "prompt"),
        (TEXT, "tools", [{"type": "function"}], None),
        (CHAT, "max_new_tokens", 5, "max_tokens"),
        (CHAT, "random_seed", 0, "seed"),
        ("/generate", "temperature", 0, "sampling_params.temperature"),
        ("/generate", "max_tokens", 5, "sampling_params.max_new_tokens"),
        ("/generate", "multiverse", {"enabled": False}, "sampling_params.multiverse"),
        ("/generate", "logprobs", True, "return_logprob"),
        ("/generate", "logprobs", 5, "top_logprobs_num"),
        ("/generate", "logprobs", 0, "top_logprobs_num"),
        ("/generate", "top_logprobs", 5, "top_logprobs_num"),
        ("/generate", "stop", ["x"], "sampling_params.stop"),
        (CHAT, "top_logprobs_num", 5, "top_logprobs"),
        (TEXT, "top_logprobs", 5, "logprobs"),
        (TEXT, "return_logprob", True, "logprobs"),
        (TEXT, "stop_token", 5, "stop_token_ids"),
        (TEXT, "stop_on_eol", True, "stop"),
        ("/api", "n", 2, None),
        ("/api", "max_tokens", 5, "tokens_to_generate"),
        ("/api", "stop", ["x"], None),
        ("/api", "stop", "x", None),
        ("/api", "stop_token_ids", [5], "stop_token"),
        ("/api", "repetition_penalty", 1.1, None),
    ],
)
def test_a_field_of_another_route_is_refused_with_what_this_one_has(
    server: Running, path: str, name: str, value: Any, has: str | None
) -> None:
    response = sent(server, path, {name: value})
    assert response.status_code == 400 and error_of(response)["param"] == name
    assert response.json()["message"].endswith("leave it out" if has is None else f"it has {has}")


def test_a_field_of_another_route_that_asks_for_nothing_more_is_taken(server: Running) -> None:
    """As by clients that know several servers, and give every name that one of them has."""
    also: dict[str, Any] = {"max_completion_tokens": 1, "tools": [], "random_seed": None, "separate_reasoning": False}
    also |= {"tool_choice": "auto", "add_generation_prompt": False, "text": "", "input_ids": [], "messages": []}
    for path, fields in (
        (TEXT, also),
        (TEXT, {"logprobs": 2, "top_logprobs": 2}),
        (CHAT, {"logprobs": True, "return_logprob": True, "top_logprobs": 1, "top_logprobs_num": 1, "input_ids": []}),
        (CHAT, {"text": "", "prompt": "", "prompts": []}),
        ("/generate", {"return_logprob": True, "logprobs": True, "top_logprobs": 1, "top_logprobs_num": 1}),
        ("/api", {"n": 1}),
    ):
        response = sent(server, path, fields)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "fields", "param", "has"),
    [
        (CHAT, {"logprobs": True, "top_logprobs_num": 1}, "top_logprobs_num", "top_logprobs"),
        ("/generate", {"return_logprob": True, "top_logprobs": 1}, "top_logprobs", "top_logprobs_num"),
        ("/generate", {"return_logprob": True, "logprobs": 1}, "logprobs", "top_logprobs_num"),
    ],
)
def test_true_is_no_number_of_alternatives(
    server: Running, path: str, fields: dict[str, Any], param: str, has: str
) -> None:
    """Python takes it for 1, and so one field for the same as the other, under another name."""
    response = sent(server, path, fields)
    assert response.status_code == 400 and error_of(response)["param"] == param
    assert response.json()["message"].endswith(f"it has {has}")


def test_the_log_names_what_is_ignored_and_nothing_that_is_refused(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", logger="megatron_multiverse.server.body"):
        assert sent(server, TEXT, {"frobnicate": 1, "max_new_tokens": 5}).status_code == 400
        assert not caplog.messages
        for path in BODY_OF:
            assert sent(server, path, {"frobnicate": 1}).status_code == 200
    assert caplog.messages == ["field 'frobnicate' of a request is ignored"] * len(BODY_OF)


def test_errors_that_ask_to_come_later_do_so_within_two_minutes() -> None:
    """The OpenAI client gives up at once where it is told to wait for longer."""
    waits = {ApiError(429, "x", retry_after=seconds).headers["Retry-After"] for seconds in (0.01, 1, 5000, 1e9)}
    assert waits == {"1", "120"}


def test_unknown_fields_are_ignored(server: Running) -> None:
    body = {"prompt": "1 + 1", "max_tokens": 1, "frobnicate": {"deep": [1]}, "user": "me"}
    assert server.post(TEXT, body).status_code == 200


def test_unknown_fields_of_our_own_object_are_refused(server: Running) -> None:
    """A typo there would change an answer without a word."""
    response = server.post(TEXT, {"prompt": "1 + 1", "max_tokens": 1, "multiverse": {"max_branch": 1}})
    assert response.status_code == 400 and error_of(response)["param"] == "multiverse"
    assert error_of(response)["message"] == "multiverse.max_branch: no such field; docs/serving.md lists them (got 1)"


def test_another_method_is_told_the_right_one(server: Running) -> None:
    response = server.post("/api", {"prompts": ["a"]})
    assert response.status_code == 405 and error_of(response)["message"] == "POST is not what /api takes; it takes PUT"


def test_large_bodies_are_cut_off_with_and_without_a_length() -> None:
    with running(limits=LimitConfig(max_body_bytes=1000)) as server:
        large = json.dumps({"prompt": "a" * 2000}).encode()
        for content in (large, iter([large[:900], large[900:]])):
            response = server.http.post(TEXT, content=content)
            assert response.status_code == 413 and error_of(response)["code"] == "body_too_large"
        assert server.post(TEXT, {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_body_that_does_not_come_is_given_up() -> None:
    with running(limits=LimitConfig(body_timeout=0.2)) as server, _connect(server) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_large_headers_are_refused(server: Running) -> None:
    answer = b""
    # The server may cut the connection while the rest of them is still on its way.
    with _connect(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000)
        answer = connection.recv(1000)
    assert b" 4" in answer.split(b"\r\n")[0] or answer == b""
    assert server.post(TEXT, {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_random_bytes_and_random_json_never_give_a_500(server: Running) -> None:
    """Random values in all places; whatever is no error must be an answer."""
    rng = random.Random(0)
    names = ["prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "echo", "stream"]
    names += ["multiverse", "logprobs", "stop_token_ids", "stream_options", "model", "user", "tokens", "prompts"]

    def value(depth: int = 0) -> Any:
        simple = [None, True, 0, 1, -1, 3.5, 2**70, "", "a", "\x00", "<Parallel>", "é" * 5]
        kind = rng.random()
        if kind < 0.6 or depth > 2:
            return rng.choice(simple)
        if kind < 0.8:
            return [value(depth + 1) for _ in range(rng.randint(0, 3))]
        return {rng.choice(names): value(depth + 1) for _ in range(rng.randint(0, 3))}

    for _ in range(150):
        body = {name: value() for name in rng.sample(names, rng.randint(0, 6))} | {"max_tokens": 3}
        path = rng.choice([TEXT, CHAT, "/api", "/tokenize", "/detokenize"])
        content = json.dumps(body).encode() if rng.random() < 0.8 else rng.randbytes(rng.randint(1, 200))
        response = server.http.request("PUT" if path == "/api" else "POST", path, content=content)
        assert response.status_code in (200, 400, 404), response.text
        if response.status_code != 200:
            error_of(response)
    server.wait_until_free()


def _connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)
