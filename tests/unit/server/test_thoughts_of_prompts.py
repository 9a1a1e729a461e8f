"""What a chat tells of the place where its answer begins, whoever wrote which tag in the prompt."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.server.chat_fields import ChatFields
from megatron_multiverse.server.chat_prompt import ChatPrompt, chat_prompt
from megatron_multiverse.server.config import ServerConfig
from megatron_multiverse.server.errors import ApiError
from megatron_multiverse.server.model import ServedModel
from tests.unit.server.running import MODEL, tokenizer

PHI_LIKE = r"""
{%- for message in messages %}
    {{- '<' + message.role + '>\n' }}
    {%- if message.reasoning_content %}{{- '<Think>' + message.reasoning_content + '</Think>' }}{%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}{{- '<tool_call>' + call.function.name + '</tool_call>' }}{%- endfor %}
    {{- '<end>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header | default('<assistant>\n') }}
    {%- if enable_thinking is defined %}{{- '<Think>' if enable_thinking else '<Think>\n</Think>' }}{%- endif %}
{%- else %}
    {{- eos_token }}
{%- endif %}
"""
"""Ends where no answer follows, as that of Phi-3, so no prompt begins with the text of the turns before its answer."""
QUOTED = {"role": "user", "content": "What does <Think> mean?"}
ON, OFF = ({"enable_thinking": enabled} for enabled in (True, False))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served(PHI_LIKE, tmp_path_factory.mktemp("template"))


def served(template: str, folder: Path) -> ServedModel:
    path = folder / "chat.jinja"
    path.write_text(template)
    return ServedModel(ServerConfig(load=MODEL, chat_template=path), tokenizer())


def prompt_of(model: ServedModel, messages: list[dict[str, Any]], **fields: Any) -> ChatPrompt:
    return asyncio.run(chat_prompt(ChatFields.model_validate({"messages": messages} | fields), model))


@pytest.mark.parametrize("question", ["1 + 1", "What does <Think> mean?", "What does </Think> mean?"])
@pytest.mark.parametrize("header", ["<assistant>\n", ""])
@pytest.mark.parametrize(("options", "thought"), [({}, "none"), (ON, "open"), (OFF, "closed")])
def test_templates_that_end_otherwise_without_an_answer(
    model: ServedModel, question: str, header: str, options: dict[str, Any], thought: str
) -> None:
    """Without a header the tag and the end stand at one place, and begin with the same character."""
    messages = [{"role": "user", "content": question}]
    found = prompt_of(model, messages, chat_template_kwargs=options | {"header": header})
    assert found.thought == thought, tokenizer().detokenize(found.ids)


@pytest.mark.parametrize(
    ("content", "thought"), [("So", "none"), ("<Think>\nSo", "open"), ("<Think>\nSo\n</Think>It", "closed")]
)
def test_turns_that_go_on_where_templates_end_otherwise(model: ServedModel, content: str, thought: str) -> None:
    messages = [QUOTED, {"role": "assistant", "content": content}]
    assert prompt_of(model, messages, continue_final_message=True).thought == thought


@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("question", ["1 + 1", "What does <Think> mean?", "What does </Think> mean?"])
@pytest.mark.parametrize(("options", "thought"), [({}, "none"), (ON, "open"), (OFF, "closed")])
def test_ids_go_on_where_their_turn_began(
    model: ServedModel, question: str, options: dict[str, Any], thought: str, repeats: bool
) -> None:
    """Also where the request does not say again how the template was to be filled: the ids show it."""
    asked = {"role": "user", "content": question}
    first = prompt_of(model, [asked], chat_template_kwargs=options)
    begun = turn_of(first, "So")
    going_on = {"continue_final_message": True, "chat_template_kwargs": options if repeats else {}}
    for end in ("", "<|endoftext|>"):
        turn = begun | {"generation_token_ids": begun["generation_token_ids"] + tokenizer().tokenize(end)}
        found = prompt_of(model, [asked, turn], **going_on)
        assert found.ids == first.ids + turn["generation_token_ids"] and found.thought == thought


@pytest.mark.parametrize("end", ["", "<|endoftext|>"])
@pytest.mark.parametrize(("content", "thought"), [("<Think>\nSo", "open"), ("So\n</Think>It is", "closed")])
def test_what_ends_a_turn_hides_none_of_its_tags(model: ServedModel, content: str, thought: str, end: str) -> None:
    """Trainers keep the token that ended a turn."""
    asked = {"role": "user", "content": "1 + 1"}
    first = prompt_of(model, [asked], chat_template_kwargs=ON if thought == "closed" else {})
    found = prompt_of(model, [asked, turn_of(first, content + end)], continue_final_message=True)
    assert found.thought == thought


def test_ids_alone_tell_where_the_template_takes_no_turns_before_the_answer(tmp_path: Path) -> None:
    """A prompt that no template would write: a turn goes on that nobody asked for."""
    strict = "{%- if messages | length < 2 %}{{ raise_exception('no answer') }}{%- endif %}" + PHI_LIKE
    ids = tokenizer().tokenize("A\n<Think>\n</Think>")
    turn = {"role": "assistant", "content": "So", "prompt_token_ids": ids, "generation_token_ids": ids[:1]}
    messages = [{"role": "system", "content": "A"}, turn]
    assert prompt_of(served(strict, tmp_path), messages, continue_final_message=True).thought == "closed"


@pytest.mark.parametrize("content", [None, "", "Wait."])
def test_calls_of_a_turn_that_goes_on_are_not_dropped(model: ServedModel, content: str | None) -> None:
    """They would stand behind the place where its text goes on. Where it brings its ids they stand in these."""
    call = {"type": "function", "function": {"name": "now", "arguments": "{}"}}
    turn = {"role": "assistant", "content": content, "reasoning_content": "\nSo\n", "tool_calls": [call]}
    with pytest.raises(ApiError, match="the last turn has tool_calls") as raised:
        prompt_of(model, [QUOTED, turn], continue_final_message=True)
    assert raised.value.status == 400 and raised.value.param == "continue_final_message"
    first = prompt_of(model, [QUOTED], chat_template_kwargs=ON)
    said = turn_of(first, "\nSo\n</Think><tool_call>now</tool_call>")
    found = prompt_of(model, [QUOTED, said | turn], continue_final_message=True)
    assert found.ids == first.ids + said["generation_token_ids"] and found.thought == "closed"


def turn_of(first: ChatPrompt, text: str) -> dict[str, Any]:
    """What was answered to a prompt, with the ids of both."""
    ids = {"prompt_token_ids": first.ids, "generation_token_ids": tokenizer().tokenize(text)}
    return {"role": "assistant", "content": text} | ids
