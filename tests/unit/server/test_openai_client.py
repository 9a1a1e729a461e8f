"""The OpenAI SDK, unmodified, as users call it."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from megatron_multiverse.server.logprobs import of_prompt
from megatron_multiverse.structure import TAGS, Tag
from tests.unit.server.running import PROMPT, Running, tokenizer

NAME = "model"


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == NAME
    assert client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match="no model 'some/other' here"):
        client.models.retrieve("some/other")


def test_completions_whole_and_streamed_are_the_same(client: openai.OpenAI, server: Running) -> None:
    whole = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=900, temperature=0)
    text, usage = whole.choices[0].text, whole.usage
    assert "Answer: A = 1550; B = 124" in text and whole.choices[0].finish_reason == "stop" and usage is not None
    assert usage.num_parallel > 1 and usage.critical_tokens < usage.completion_tokens  # type: ignore[attr-defined]
    with server.in_step():
        chunks = list(
            client.completions.create(
                model=NAME,
                prompt=PROMPT,
                max_tokens=900,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text
    again = chunks[-1].usage
    assert chunks[-1].choices == [] and again is not None and again.prompt_tokens_details is not None
    assert again.prompt_tokens_details.cached_tokens > 0, "the first answer computed this prompt"
    assert again == usage.model_copy(update={"prompt_tokens_details": again.prompt_tokens_details})
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert len(chunks) > 50


def test_cached_tokens_count_once_for_a_prompt_like_its_tokens(client: openai.OpenAI) -> None:
    """Of a prompt that is new, the answers but the first find what that one computed: nothing was saved."""
    prompts = [f"{word} more than once. {PROMPT}" for word in ("Asked", "Told")]  # no other test begins like this
    options = {"model": NAME, "prompt": prompts, "max_tokens": 4, "n": 3, "temperature": 1}
    pages = [(len(tokenizer().tokenize(prompt)) - 1) // 16 for prompt in prompts]
    first, second = (client.completions.create(**options).usage for _ in range(2))  # type: ignore[call-overload]
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == 16 * sum(pages)


@pytest.mark.parametrize("mode", ["linear", "branches"])
def test_every_chunk_says_what_was_used_so_far_if_asked(client: openai.OpenAI, server: Running, mode: str) -> None:
    with server.in_step():
        *chunks, last = client.completions.create(
            model=NAME,
            prompt=PROMPT,
            max_tokens=900,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
            extra_body={"multiverse": {"stream_mode": mode}},
        )
    used = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(used) == len(chunks) and used[0] == 0 and used == sorted(used) and len(set(used)) > 50
    assert last.usage is not None and used[-1] == last.usage.completion_tokens


def test_several_prompts_and_answers_keep_their_order(client: openai.OpenAI) -> None:
    prompts = ["Work out A = 1 + 2.", "Work out A = 3 + 4."]
    whole = client.completions.create(model=NAME, prompt=prompts, max_tokens=20, n=2, temperature=2, seed=3, echo=True)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    for choice in whole.choices:
        assert choice.text.startswith(prompts[choice.index // 2])
    assert len({choice.text for choice in whole.choices[:2]}) == 2, "answers to one prompt differ"
    streamed: dict[int, str] = defaultdict(str)
    first = []
    for chunk in client.completions.create(
        model=NAME, prompt=prompts, max_tokens=20, n=2, temperature=2, seed=3, echo=True, stream=True
    ):
        (choice,) = chunk.choices
        first += [choice.index] * (choice.index not in streamed)
        streamed[choice.index] += choice.text
    assert [streamed[k] for k in range(4)] == [choice.text for choice in whole.choices] and first == [0, 1, 2, 3]


def test_without_a_seed_every_answer_is_another(client: openai.OpenAI) -> None:
    drawn = {"model": NAME, "prompt": "abc", "max_tokens": 30, "temperature": 2}
    texts = {client.completions.create(**drawn).choices[0].text for _ in range(3)}  # type: ignore[call-overload]
    assert len(texts) == 3


def test_chat_and_its_stream_helper(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    whole = client.chat.completions.create(model=NAME, messages=messages, temperature=0)  # type: ignore[arg-type]
    content = whole.choices[0].message.content
    assert content is not None and content.endswith("Answer: A = 1550; B = 124")
    assert whole.choices[0].message.role == "assistant"
    with client.chat.completions.stream(model=NAME, messages=messages, temperature=0) as stream:  # type: ignore[arg-type]
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == content and final.choices[0].message.role == "assistant"


def test_thoughts_apart_whole_and_streamed(client: openai.OpenAI) -> None:
    options = {"model": NAME, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0}
    options["extra_body"] = {"multiverse": {"separate_reasoning": True}}
    message = client.chat.completions.create(**options).choices[0].message  # type: ignore[call-overload]
    assert message.content.strip() == "Answer: A = 1550; B = 124"
    assert "<Path>" in message.reasoning_content and "Think>" not in message.reasoning_content
    content, thought = "", ""
    for chunk in client.chat.completions.create(**options, stream=True):  # type: ignore[call-overload]
        content += chunk.choices[0].delta.content or ""
        thought += getattr(chunk.choices[0].delta, "reasoning_content", "")
    assert (content, thought) == (message.content, message.reasoning_content)


def test_branches_side_by_side(client: openai.OpenAI, server: Running) -> None:
    """Labels stand beside the text, not in it; the pieces of each branch are its text."""
    options = {"model": NAME, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content  # type: ignore[call-overload]
    texts: dict[str, str] = defaultdict(str)
    order, marks = [], []
    extra = {"multiverse": {"stream_mode": "branches"}}
    with server.in_step():
        chunks = list(client.chat.completions.create(**options, stream=True, extra_body=extra))  # type: ignore[call-overload]
    for chunk in chunks:
        (choice,) = chunk.choices
        assert not choice.delta.model_extra
        label = getattr(choice, "multiverse", None)
        if label is None or "branch" not in label:
            continue
        texts[label["branch"]] += choice.delta.content
        order.append(label["branch"])
        if "event" in label:
            marks.append((label["event"], label["branch"], label["block"]))
    assert marks == [("open", "1", 1), ("open", "2", 1), ("close", "2", 1), ("close", "1", 1)]
    before, after = texts[""].split("</Goal>")
    assert before + "</Goal>" + texts["1"] + texts["2"] + after == whole
    inner = order[order.index("2") : len(order) - order[::-1].index("2")]
    assert inner.count("1") > 20 and inner.count("2") > 20, "they write at the same time"


@pytest.mark.parametrize("limit", [{"enabled": False}, {"max_depth": 0}, {"max_branches": 1}], ids=str)
def test_forks_can_be_limited(client: openai.OpenAI, limit: dict[str, object]) -> None:
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 100, "temperature": 0}
    choice = client.completions.create(**options, extra_body={"multiverse": limit}).choices[0]  # type: ignore[call-overload]
    assert choice.multiverse["blocks"] == [] and choice.multiverse["num_parallel"] == 1
    assert "</Goal>" in choice.text


def test_the_tree_as_data(client: openai.OpenAI) -> None:
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 900, "temperature": 0}
    choice = client.completions.create(**options, extra_body={"multiverse": {"return_tree": True}}).choices[0]  # type: ignore[call-overload]
    (block,) = choice.multiverse["blocks"]
    assert [branch["branch"] for branch in block["branches"]] == ["1", "2"]
    assert all(branch["finish_reason"] == "path_end" and not branch["forced_close"] for branch in block["branches"])
    tree = choice.multiverse["tree"]
    count = len(tree["token_ids"])
    assert all(len(tree[name]) == count for name in ("logprobs", "position_ids", "labels", "parents", "sampled"))
    assert [logprob is not None for logprob in tree["logprobs"]] == tree["sampled"]
    assert not any(tag in choice.text.split("</Conclusion>")[-1] for tag in TAGS[6:])


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    choice = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=700, temperature=0, logprobs=3).choices[0]
    found = choice.logprobs
    assert found is not None and found.tokens is not None and "".join(found.tokens) == choice.text
    assert found.token_logprobs is not None and found.top_logprobs is not None and found.text_offset is not None
    forced = 0
    for text, logprob, top, offset in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset, strict=True
    ):
        assert choice.text.startswith(text, offset)
        if logprob is None:
            forced += 1
            assert top is None
        else:
            assert top[text] == logprob == max(top.values()), "greedy, to the last bit"
    assert 10 < forced < 60, "what the engine wrote has none"


def test_a_prompt_is_scored_as_evaluators_ask(client: openai.OpenAI) -> None:
    """Ids in, echo, one token, one alternative; and the same with no token at all, as Megatron's clients ask."""
    ids = [tokenizer().tokenize(PROMPT + "<Think>\nLet's think in parallel.\n"), tokenizer().tokenize("A = 15")]
    for most in (1, 0):
        choices = client.completions.create(
            model=NAME, prompt=ids, max_tokens=most, echo=True, logprobs=1, temperature=0, seed=1234
        ).choices
        for choice, prompt in zip(choices, ids, strict=True):
            found = choice.logprobs
            assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
            assert len(found.token_logprobs) == len(found.top_logprobs) == len(prompt) + most
            assert found.token_logprobs[0] is None and "".join(found.tokens or []) == choice.text
            for logprob, top in zip(found.token_logprobs[1 : len(prompt)], found.top_logprobs[1:], strict=False):
                assert logprob in top.values(), "the very same number"
    greedy = [logprob == max(top.values()) for logprob, top in zip(*_scored(client, ids[0]), strict=True)]
    assert greedy[-8:] == [True] * 8 and not all(greedy)


def test_each_of_several_answers_has_the_scores_of_a_long_prompt(client: openai.OpenAI) -> None:
    """The prompt is scored in several steps, and an answer of one token would be complete after the first."""
    prompt = (tokenizer().tokenize(PROMPT) * 20)[:600]
    choices = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=1, echo=True, logprobs=0, n=3, temperature=1, seed=1
    ).choices
    scores = [choice.logprobs.token_logprobs[:600] for choice in choices if choice.logprobs is not None]  # type: ignore[index]
    assert scores[0] == scores[1] == scores[2] and scores[0].count(None) == 1


def test_what_an_answer_cut_short_did_not_read_of_its_prompt_has_no_score() -> None:
    cut = SimpleNamespace(prompt_ids=[5, 6, 7], prompt_logprobs=[None, -1.5], prompt_top_logprobs=None)
    entries = of_prompt(cut)  # type: ignore[arg-type]
    assert [(entry.token, entry.logprob, entry.top) for entry in entries] == [
        (5, None, []),
        (6, -1.5, []),
        (7, None, []),
    ]


def test_the_token_that_begins_texts_comes_first_where_it_is_asked_for(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    (begin,) = tokenizer().tokenize("<Think>")

    def prompt_ids(prompt: object, **extra: object) -> list[int]:
        options = {"model": NAME, "prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
        choice = client.completions.create(**options, extra_body=extra).choices[0]  # type: ignore[call-overload]
        return [tokenizer().id_to_text.index(text) for text in choice.logprobs.tokens[:-1]]

    known = server.app.state.model.tokenizer
    ids = tokenizer().tokenize("1 + 1")
    assert prompt_ids("1 + 1", add_special_tokens=True) == ids, "this tokenizer has none"
    monkeypatch.setattr(known, "special_tokens", lambda: {"bos_token": "<Think>"})
    assert prompt_ids("1 + 1") == prompt_ids("1 + 1", add_special_tokens=False) == ids
    assert prompt_ids("1 + 1", add_special_tokens=True) == prompt_ids("<Think>1 + 1", add_special_tokens=True)
    assert prompt_ids("1 + 1", add_special_tokens=True) == [begin, *ids]
    assert prompt_ids(ids, add_special_tokens=True) == ids, "ids are the client's own"
    messages = [{"role": "user", "content": "1 + 1"}]
    options = {"model": NAME, "messages": messages, "max_tokens": 1}
    counts = [
        client.chat.completions.create(**options, extra_body={"add_special_tokens": add}).usage.prompt_tokens  # type: ignore[call-overload]
        for add in (False, True)
    ]
    assert counts[1] == counts[0] + 1


def _scored(client: openai.OpenAI, prompt: list[int]) -> tuple[list[float], list[dict[str, float]]]:
    found = (
        client.completions.create(model=NAME, prompt=prompt, max_tokens=0, echo=True, logprobs=1, temperature=0)
        .choices[0]
        .logprobs
    )
    assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
    return found.token_logprobs[1:], found.top_logprobs[1:]


@pytest.mark.parametrize("stop", ["carry", ["nowhere", "0, carry"], "</Conclusion>\n", "in parallel"])
def test_stop_texts_end_answers_whole_and_streamed(client: openai.OpenAI, stop: str | list[str]) -> None:
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 700, "temperature": 0}
    full = client.completions.create(**options).choices[0].text  # type: ignore[call-overload]
    whole = client.completions.create(**options, stop=stop).choices[0]  # type: ignore[call-overload]
    streamed = "".join(c.choices[0].text for c in client.completions.create(**options, stop=stop, stream=True))  # type: ignore[call-overload]
    assert streamed == whole.text and whole.finish_reason == "stop"
    in_paths = stop in ("carry", ["nowhere", "0, carry"])
    assert (whole.text == full) == in_paths, "outside of paths alone"
    if not in_paths:
        assert stop not in whole.text and full.startswith(whole.text.split("\n</")[0])


@pytest.fixture(scope="module")
def answered() -> dict[tuple[str, bool], Any]:
    """Whole answers by what stops them, and whether also in paths."""
    return {}


@pytest.mark.parametrize(
    "stop", ["B = 124\n", "124", "carry 1, left 0 + 0\nB", "1, left 5", ["nowhere", "write"], "50; B"]
)
@pytest.mark.parametrize("mode", ["linear", "branches"])
@pytest.mark.parametrize("in_paths", [True, False])
def test_streams_leave_out_stop_texts_in_paths_too(
    client: openai.OpenAI, stop: str | list[str], mode: str, in_paths: bool, answered: dict[tuple[str, bool], Any]
) -> None:
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 700, "temperature": 0, "stop": stop}
    extra = {"multiverse": {"stop_in_branches": in_paths, "stream_mode": mode}}
    if (case := (str(stop), in_paths)) not in answered:  # the same for both modes
        answered[case] = client.completions.create(**options, extra_body=extra).choices[0]  # type: ignore[call-overload]
    whole = answered[case]
    texts: dict[tuple[int, str], str] = {}
    for chunk in client.completions.create(**options, extra_body=extra, stream=True):  # type: ignore[call-overload]
        ours = chunk.choices[0].model_extra.get("multiverse", {})
        place = (ours.get("block", 0), ours.get("branch", ""))
        texts[place] = texts.get(place, "") + chunk.choices[0].text
    root = texts.pop((0, ""))
    if mode == "branches":  # the paths stand where the root's text goes on with its conclusion
        head, conclusion = root.split("</Goal>")
        root = head + "</Goal>" + "".join(texts[key] for key in sorted(texts)) + conclusion
    assert root == whole.text
    ends = [branch["finish_reason"] for branch in whole.multiverse["blocks"][0]["branches"]]
    assert ("stop" in ends) == (in_paths and stop != "50; B")


def test_tries_are_committed(client: openai.OpenAI) -> None:
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 700, "temperature": 0}
    choice = client.completions.create(**options, extra_body={"multiverse": {"commit_after": 1}}).choices[0]  # type: ignore[call-overload]
    (block,) = choice.multiverse["blocks"]
    assert sorted(branch["finish_reason"] for branch in block["branches"]) == ["dropped", "path_end"]
    assert choice.multiverse["dropped_tokens"] > 0


@pytest.mark.parametrize("mode", ["linear", "branches"])
def test_clients_can_say_what_is_done_in_parallel(client: openai.OpenAI, mode: str) -> None:
    """The header of a block, which the model would not have written for this prompt, and what it makes of it."""
    start = "<Parallel>\n<Goal>\n<Outline>\n1: a\n</Outline>\n<Outline>\n2: b\n</Outline>\n</Goal>"
    options = {"model": NAME, "prompt": "xyz", "max_tokens": 120, "temperature": 0}
    asked = {"extra_body": {"multiverse": {"answer_start": start, "branch_max_tokens": 20, "stream_mode": mode}}}
    choice = client.completions.create(**options, **asked).choices[0]  # type: ignore[call-overload]
    assert choice.text.startswith(start + "\n<Path>\n1:") and "\n<Path>\n2:" in choice.text
    (block,) = choice.multiverse["blocks"]
    assert [branch["outline"] for branch in block["branches"]] == ["1:", "2:"]
    chunks = list(client.completions.create(**options, **asked, stream=True))  # type: ignore[call-overload]
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    if mode == "linear":
        assert "".join(piece.text for piece in pieces) == choice.text
    else:
        root = "".join(piece.text for piece in pieces if getattr(piece, "multiverse", {}).get("branch") == "")
        assert root.startswith(start + "\n<Conclusion>")
    messages = [{"role": "user", "content": "xyz"}]
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=120, **asked)  # type: ignore[call-overload]
    assert answer.choices[0].message.content.startswith(start + "\n<Path>")
    asked["extra_body"]["multiverse"]["answer_start"] = start + "\n<Path>"
    with pytest.raises(openai.BadRequestError, match="answer_start goes on after the </Goal>"):
        client.completions.create(**options, **asked)  # type: ignore[call-overload]


def test_paths_are_closed_at_their_limit(client: openai.OpenAI) -> None:
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 700, "temperature": 0}
    choice = client.completions.create(**options, extra_body={"multiverse": {"branch_max_tokens": 12}}).choices[0]  # type: ignore[call-overload]
    (block,) = choice.multiverse["blocks"]
    assert {branch["finish_reason"] for branch in block["branches"]} == {"length"}
    assert all(branch["forced_close"] and branch["tokens"] <= 20 for branch in block["branches"])
    assert choice.finish_reason == "stop", "the answer goes on"


@pytest.mark.parametrize("mode", ["linear", "branches"])
def test_broken_grammar_is_an_error_where_asked(client: openai.OpenAI, server: Running, mode: str) -> None:
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 700, "temperature": 0}
    ours = {"on_malformed": "error", "stream_mode": mode}
    whole = client.completions.create(**options).choices[0].text  # type: ignore[call-overload]
    asked = {"extra_body": {"multiverse": ours}}
    assert client.completions.create(**options, **asked).choices[0].text == whole, "what is well formed stays"  # type: ignore[call-overload]
    asked["logit_bias"] = {str(tokenizer().structure_vocab.tag_ids[Tag.END_PATH]): 100}  # outside of any path
    with pytest.raises(openai.UnprocessableEntityError) as broken:
        client.completions.create(**options, **asked)  # type: ignore[call-overload]
    assert broken.value.code == "malformed_output" and "found </Path>, expected" in broken.value.message
    with pytest.raises(openai.APIError, match="found </Path>, expected"):
        list(client.completions.create(**options, **asked, stream=True))  # type: ignore[call-overload]
    server.wait_until_free()


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    options = {"model": NAME, "messages": messages, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    choice = client.chat.completions.create(**options).choices[0]  # type: ignore[call-overload]
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content
    drawn = [entry for entry in entries if entry.logprob is not None]
    assert 0 < len(drawn) < len(entries)
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob == entry.logprob for entry in drawn)


@pytest.mark.parametrize("mode", ["linear", "branches"])
def test_logprobs_in_streams_are_those_of_the_whole(client: openai.OpenAI, mode: str) -> None:
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 700, "temperature": 0, "logprobs": 2}
    options["extra_body"] = {"multiverse": {"stream_mode": mode}}
    whole = client.completions.create(**options).choices[0].logprobs  # type: ignore[call-overload]
    found: dict[str, list[object]] = defaultdict(list)
    for chunk in client.completions.create(**options, stream=True):  # type: ignore[call-overload]
        if (piece := chunk.choices[0].logprobs) is not None:
            for name, values in piece.model_dump().items():
                found[name] += values
    expected = whole.model_dump()
    if mode == "branches":  # the same tokens, in the order in which they were written
        del found["text_offset"], expected["text_offset"]
        found, expected = ({k: sorted(map(str, v)) for k, v in lists.items()} for lists in (found, expected))
    assert found == expected
    messages = [{"role": "user", "content": PROMPT}]
    chat = {"model": NAME, "messages": messages, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    chat["extra_body"] = options["extra_body"]
    entries = client.chat.completions.create(**chat).choices[0].logprobs.content  # type: ignore[call-overload]
    streamed = []
    for chunk in client.chat.completions.create(**chat, stream=True):  # type: ignore[call-overload]
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    if mode == "branches":
        entries, streamed = sorted(entries, key=str), sorted(streamed, key=str)
    assert streamed == entries


def test_an_answer_that_cannot_fork_just_stops(client: openai.OpenAI) -> None:
    """As other servers do, whole and streamed: nothing is forced at its end to close what is open."""
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    options["extra_body"] = {"multiverse": {"enabled": False}}
    for stop in (None, "</Goal>"):
        choice = client.completions.create(**options, stop=stop, logprobs=0).choices[0]  # type: ignore[call-overload]
        streamed = client.completions.create(**options, stop=stop, stream=True)  # type: ignore[call-overload]
        assert choice.text == "".join(chunk.choices[0].text for chunk in streamed)
        assert choice.text.startswith("<Think>") and "</Think>" not in choice.text
        assert None not in choice.logprobs.token_logprobs
    for most in (1, 2, 3, 17):
        cut = client.completions.create(**options | {"max_tokens": most})  # type: ignore[call-overload]
        assert cut.usage.completion_tokens == most and cut.choices[0].finish_reason == "length", "none is kept back"


@pytest.mark.parametrize("ends_at_once", [False, True])
def test_an_answer_that_cannot_fork_keeps_what_it_was_told_to_begin_with(
    client: openai.OpenAI, ends_at_once: bool
) -> None:
    """Nobody drew its beginning either, but that is no closing tag: it comes, in streams too."""
    (end,) = tokenizer().tokenize("<|endoftext|>")
    start = "<Think>\nLet's think"
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "logprobs": 0}
    options["logit_bias"] = {str(end): 100} if ends_at_once else {}
    extra = {"multiverse": {"max_depth": 0, "answer_start": start}}
    whole = client.completions.create(**options, extra_body=extra).choices[0]  # type: ignore[call-overload]
    assert whole.text == start if ends_at_once else whole.text.startswith(start + " in parallel")
    for mode in ("linear", "branches"):
        extra["multiverse"]["stream_mode"] = mode
        chunks = [c.choices[0] for c in client.completions.create(**options, extra_body=extra, stream=True)]  # type: ignore[call-overload]
        assert "".join(choice.text for choice in chunks) == whole.text
        tokens = [token for choice in chunks if choice.logprobs for token in choice.logprobs.tokens]
        assert tokens == [token for token in whole.logprobs.tokens if token]


def test_ways_of_drawing_reach_the_engine(client: openai.OpenAI) -> None:
    (word,) = tokenizer().tokenize("1")
    text = (
        client.completions.create(model=NAME, prompt="A = ", max_tokens=8, temperature=0, logit_bias={str(word): 100})
        .choices[0]
        .text
    )
    assert text == "1" * 8
    penalised = (
        client.completions.create(
            model=NAME,
            prompt="A = ",
            max_tokens=8,
            temperature=0,
            logit_bias={str(word): 100},
            frequency_penalty=2,
            extra_body={"repetition_penalty": 1000.0, "min_tokens": 8, "min_p": 0.1, "top_k": 50},
        )
        .choices[0]
        .text
    )
    assert "1" in penalised and penalised != text


def test_errors_are_the_types_of_the_sdk(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=NAME, prompt="a", temperature=-1)
    assert bad.value.param == "temperature" and bad.value.code == "invalid_value" and "-1" in bad.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found" and NAME in missing.value.message
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=NAME, input="a")
    server.app.state.draining = True
    try:
        with pytest.raises(openai.InternalServerError) as draining:
            client.completions.create(model=NAME, prompt="a")
        assert draining.value.status_code == 503 and draining.value.code == "draining"
    finally:
        server.app.state.draining = False
