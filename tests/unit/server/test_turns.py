"""Later turns of a chat: the ids of earlier answers, and their blocks laid out again."""

from __future__ import annotations

from typing import Any

from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.inference import Request, build_engine
from tests.unit.server.running import MODEL, PROMPT, Running, tokenizer

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
