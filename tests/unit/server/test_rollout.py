"""Answers as data, as frameworks for reinforcement learning ask for them."""

from __future__ import annotations

from megatron_multiverse.model.device import device_name
from megatron_multiverse.structure import lay_out, parse
from tests.unit.server.running import PROMPT, Running, tokenizer


def test_ids_in_and_ids_labels_and_logprobs_out(server: Running) -> None:
    ids = tokenizer().tokenize(PROMPT)
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 700, "temperature": 0}, "return_logprob": True}
    answer = server.post("/generate", body | {"top_logprobs_num": 2, "rid": "mine"}).json()
    facts, tree = answer["meta_info"], answer["multiverse"]["tree"]
    assert facts["id"] == "mine" and facts["finish_reason"]["type"] == "stop" and facts["prompt_tokens"] == len(ids)
    assert [token for _, token, _ in facts["output_token_logprobs"]] == answer["output_ids"] == tree["token_ids"]
    assert [logprob for logprob, _, _ in facts["output_token_logprobs"]] == tree["logprobs"]
    assert [logprob is not None for logprob in tree["logprobs"]] == tree["sampled"] and not all(tree["sampled"])
    assert len(facts["output_top_logprobs"]) == facts["completion_tokens"]
    # What training lays out from the ids alone is what the engine did.
    plan = lay_out(parse([*ids, *answer["output_ids"]], tokenizer().structure_vocab, prompt_length=len(ids)))
    assert (
        tree["labels"] == plan.r[len(ids) :].tolist() and tree["position_ids"] == plan.position_ids[len(ids) :].tolist()
    )
    assert tokenizer().detokenize(answer["output_ids"]) == answer["text"]


def test_several_prompts_give_a_list(server: Running) -> None:
    body = {"text": ["1 + 1", "2 + 2"], "sampling_params": {"max_new_tokens": 2, "temperature": 1.0, "n": 2}}
    answers = server.post("/generate", body).json()
    assert [len(answer["output_ids"]) > 0 for answer in answers] == [True] * 4
    assert len(server.post("/generate", {"input_ids": [[1, 2]], "sampling_params": {"max_new_tokens": 1}}).json()) == 1


def test_what_is_not_served_is_named(server: Running) -> None:
    for body, param in (
        ({}, "input_ids"),
        ({"text": "a", "input_ids": [1]}, "input_ids"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "stream": True}, "stream"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 0}}, "sampling_params"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "sampling_params"),
    ):
        response = server.post("/generate", body)
        assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


def test_server_info(server: Running) -> None:
    info = server.http.get("/server_info").json()
    assert info["status"] == "ready" and info["max_position"] > 0 and info["num_pages"] > 0
    model = server.http.get("/model_info").json()
    assert info["device"] == model["device"] == device_name(next(server.engine.runner.model.parameters()).device)
    assert (model["tensor_model_parallel_size"], model["pipeline_model_parallel_size"]) == (1, 1)


def test_a_client_needs_no_tokenizer_of_its_own(server: Running) -> None:
    """The shapes that lm-eval reads: an object with eos_token, ids of a text, the text of ids."""
    info = server.http.get("/tokenizer_info").json()
    assert info.keys() == {"bos_token", "eos_token", "pad_token", "chat_template"} and info["eos_token"]
    text = "Work out A = 5 + 6.\n<Parallel>\né"
    found = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()
    assert found["tokens"] == tokenizer().tokenize(text) and found["count"] == len(found["tokens"])
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
