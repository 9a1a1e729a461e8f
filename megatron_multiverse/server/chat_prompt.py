"""A conversation as the prompt of its next turn: through the chat template to ids, and what is to be known of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.conversation import cut_at_answers
from megatron_multiverse.server.chat_fields import ChatFields
from megatron_multiverse.server.errors import ApiError, refuse
from megatron_multiverse.server.messages import Message, plain_turns
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.tool_calls import CLOSE
from megatron_multiverse.structure import Thought, last_thought, lex

TEMPLATE_NAMES = frozenset({"messages", "conversations", "chat_template", "documents", "tools"})
"""Names that the template itself is given."""
THREAD_TURNS = 1000
"""Turns of a conversation beyond which they are read in a thread."""
_HERE = "<<goes on here>>"
"""Put behind a thought that goes on, to find its end in what the template makes of it."""


class ChatPrompt(NamedTuple):
    """What an answer goes on from."""

    ids: list[int]
    answers: list[tuple[int, int]]
    """[start, end) in them of each earlier answer that is to be laid out again, if any."""
    thought: Thought
    """Where the answer begins: in a thought that the template has opened for it, or in which it goes on; after one; or
    neither."""


async def chat_prompt(fields: ChatFields, model: ServedModel) -> ChatPrompt:
    """The conversation as a prompt.

    Where the last turn of the assistant brings the ids that it was made of (`prevent_retokenization`), they are used as
    they are, and only what comes after it is tokenized: text tokenized again could give other ids than were drawn.

    Raises:
        ApiError: 400, naming what is wrong.
    """
    if not fields.messages:
        raise refuse("messages", "empty; give at least one message")
    variables = _template_variables(fields)
    # In a thread, which lets others go on now and then, unless that takes longer than the turns themselves.
    is_long = len(fields.messages) > THREAD_TURNS
    messages = await asyncio.to_thread(plain_turns, fields.messages) if is_long else plain_turns(fields.messages)
    template = model.tool_template if "tools" in variables else model.template
    if any("tool_calls" in message for message in messages) and "tool_calls" not in template:
        raise refuse("messages", "a turn with tool_calls, which the chat template of the model does not show")
    goes_on, kept = bool(variables["continue_final_message"]), _kept_ids(fields, model)
    from_ids = goes_on and kept is not None and kept[0] == len(messages)
    if from_ids:
        variables["continue_final_message"] = False  # no text of the turn is needed
    text = await _render(messages, variables, model)
    if fields.tool_use.functions and text == await _render(messages, variables | {"tools": None}, model):
        raise refuse("tools", "the chat template of the model does not show them; serve it with one that does")
    if kept is None:
        ids, spans = await _tokenized(fields, model, messages, text)
    else:
        ids = kept[1] if from_ids else await _after_kept(kept, messages, variables, text, model)
        spans = _known_spans(fields.messages, kept[1]) if fields.ours.replay_structure else []
    if not ids:
        raise refuse("messages", "the conversation has no tokens")
    if from_ids:
        thought = await _thought_of_ids(fields.messages[-1], messages[:-1], variables, model)
    elif (thought := last_thought(ids, model.tokenizer.structure_vocab, model.end_ids)) != "none":
        thought = await _thought_of_answer(messages[:-1] if goes_on else messages, variables, text, model)
    return ChatPrompt(ids, [(start, end) for start, end in spans if start < end < len(ids)], thought)


async def _tokenized(
    fields: ChatFields, model: ServedModel, messages: list[dict[str, Any]], text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a conversation, and where the answers in it stand that are to be laid out again."""
    pieces: list[str] = [text]
    answers: list[tuple[int, int]] = []
    if fields.ours.replay_structure:
        try:
            pieces, answers = cut_at_answers(text, messages)
        except GenerationError as error:
            raise refuse("multiverse", str(error)) from None
    tokenized = await model.tokenize(pieces)
    ends = [0, *itertools.accumulate(map(len, tokenized))]
    spans = [(ends[first], ends[last]) for first, last in answers]
    ids = list(itertools.chain.from_iterable(tokenized))
    begin = model.begun([]) if fields.add_special_tokens else []
    begin = model.begin_ids("add_BOS") if fields.add_BOS else begin
    if ids[: len(begin)] != begin:  # most templates write it themselves
        ids, spans = begin + ids, [(start + len(begin), end + len(begin)) for start, end in spans]
    return ids, spans


async def _after_kept(
    kept: tuple[int, list[int]],
    messages: list[dict[str, Any]],
    variables: dict[str, Any],
    text: str,
    model: ServedModel,
) -> list[int]:
    """The ids of a conversation whose last turn of the assistant has brought its own, with all before it."""
    count, known = kept
    parts = {"add_generation_prompt": False, "continue_final_message": False}
    before = await model.render(messages[:count], variables | parts)
    last = CLOSE if "tool_calls" in messages[count - 1] else messages[count - 1]["content"]
    end = before.rfind(last) + len(last)
    if not last or not text.startswith(before) or end < len(last):
        raise refuse("messages", "this chat template changes earlier turns; set prevent_retokenization to false")
    return known + (await model.tokenize([text[end:]]))[0]


async def _render(messages: list[dict[str, Any]], variables: dict[str, Any], model: ServedModel) -> str:
    """The text of the prompt. Where the last turn is to go on and has come no further than its thought, the text ends
    there: templates alone would close the thought, since it is followed by what the turn says, be that nothing."""
    last = messages[-1]
    thought = last.get("reasoning_content")
    if variables["continue_final_message"] and "tool_calls" in last:  # they stand behind what would go on
        raise refuse(
            "continue_final_message",
            "the last turn has tool_calls, which end it; leave them out, give the turn with its prompt_token_ids and "
            "generation_token_ids, or drop continue_final_message",
        )
    if not (variables["continue_final_message"] and thought and not last["content"]):
        return await model.render(messages, variables)
    marked = [*messages[:-1], last | {"reasoning_content": thought + _HERE}]
    text, found, _ = (await model.render(marked, variables | {"continue_final_message": False})).rpartition(_HERE)
    if not found:
        raise refuse(
            "continue_final_message",
            "the last turn has a thought and no content, and the chat template does not show the thought; give it as "
            "content, with its tag, or drop continue_final_message",
        )
    return text


async def _thought_of_ids(
    turn: Message, earlier: list[dict[str, Any]], variables: dict[str, Any], model: ServedModel
) -> Thought:
    """Where a turn goes on that has brought its ids: as its own last tag says, whatever ends stand behind it; else
    where the turn itself began, as the chat said of it that made it.

    Args:
        turn: the last one, with its ids.
        earlier: the turns before it.
        variables: of the template.
        model: that is served.
    """
    vocab = model.tokenizer.structure_vocab
    own = last_thought([token for token in turn.generation_token_ids or [] if token != vocab.eos_id], vocab)
    if own != "none":
        return own
    prompt = turn.prompt_token_ids or []
    begun = last_thought(prompt, vocab, model.end_ids)
    if begun == "none":
        return begun
    with contextlib.suppress(ApiError):  # templates may want turns before an answer
        text = await model.render(earlier, variables | {"add_generation_prompt": True, "continue_final_message": False})
        start = await _start_of_answer(earlier, variables, text, model)
        # The ids may be of a prompt that was asked for otherwise, such as with another enable_thinking.
        if (start or not earlier) and (await model.detokenize(prompt)).endswith(text[start:]):
            return _thought_behind(start, text)
    return begun


async def _thought_of_answer(
    earlier: list[dict[str, Any]], variables: dict[str, Any], text: str, model: ServedModel
) -> Thought:
    """Where an answer begins whose prompt has Think tags: they count in what the template writes for it, and in the
    turn that goes on. What others have thought, or written of tags, in earlier turns is none of its thoughts.

    Args:
        earlier: the turns before the answer.
        variables: of the template.
        text: the conversation, up to where the answer goes on.
        model: that is served.
    """
    start = await _start_of_answer(earlier, variables, text, model)
    thought = _thought_behind(start, text)
    return thought if start or not earlier or thought == "open" else "none"


async def _start_of_answer(
    earlier: list[dict[str, Any]], variables: dict[str, Any], text: str, model: ServedModel
) -> int:
    """The character of the text up to which it is that of the earlier turns alone; 0 if nothing tells them apart.
    Behind them some templates write something else, such as an end, where no answer follows."""
    before = ""
    if earlier:
        parts = {"add_generation_prompt": False, "continue_final_message": False}
        with contextlib.suppress(ApiError):  # templates may want another turn last
            before = await model.render(earlier, variables | parts)
    return len(os.path.commonprefix([text, before]))  # noqa: RUF071 (of characters; these are no paths)


def _thought_behind(start: int, text: str) -> Thought:
    """Where a text stands at its end, as the last Think tag says that ends behind a character. The tag may begin before
    it: `<Think>` and an end such as `<|end|>` have their first character in common."""
    ids, offsets, vocab = lex(text)
    ends = [*offsets[1:], len(text)]
    return last_thought([token for token, end in zip(ids, ends, strict=False) if end > start], vocab)


def _template_variables(fields: ChatFields) -> dict[str, Any]:
    """What the template is given beside the messages."""
    variables = dict(fields.chat_template_kwargs or {})
    taken = TEMPLATE_NAMES & variables.keys()
    if taken:
        raise refuse("chat_template_kwargs", f"{sorted(taken)[0]} cannot be given")
    goes_on = bool(fields.continue_final_message)
    if goes_on and fields.add_generation_prompt:
        raise refuse(
            "continue_final_message", "goes on with the last turn, add_generation_prompt begins another; drop one"
        )
    variables["add_generation_prompt"] = not goes_on and fields.add_generation_prompt is not False
    variables["continue_final_message"] = goes_on
    if fields.tool_use.functions:
        variables["tools"] = fields.tool_use.shown
    return variables


def _known_spans(messages: Sequence[Message], known: Sequence[int]) -> list[tuple[int, int]]:
    """Where the answers stand whose turns bring their ids."""
    spans = []
    for message in messages:
        before, ids = message.prompt_token_ids, message.generation_token_ids
        if before is not None and ids is not None and [*before, *ids] == list(known[: len(before) + len(ids)]):
            spans.append((len(before), len(before) + len(ids)))
    return spans


def _kept_ids(fields: ChatFields, model: ServedModel) -> tuple[int, list[int]] | None:
    """(messages up to and with the last one of the assistant, its ids with those of the prompt before it)."""
    if fields.prevent_retokenization is False:
        return None
    for count in range(len(fields.messages), 0, -1):
        message = fields.messages[count - 1]
        goes_on = fields.continue_final_message and count == len(fields.messages) and message.generation_token_ids
        # An empty one stands nowhere in the text, where what comes behind it has to be found.
        if message.role == "assistant" and (message.content or message.tool_calls or goes_on):
            if message.prompt_token_ids is None or message.generation_token_ids is None:
                return None
            ids = [*message.prompt_token_ids, *message.generation_token_ids]
            model.check_ids("messages", ids)
            return count, ids
    return None
