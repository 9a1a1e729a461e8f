"""`/v1/chat/completions` and `/chat/completions`: OpenAI's chat, with Megatron's and vLLM's extensions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.conversation import cut_at_answers
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server import refused, shapes
from megatron_multiverse.server.answer import Piece, answer_texts
from megatron_multiverse.server.batch import Asked
from megatron_multiverse.server.body import check_others, read_fields
from megatron_multiverse.server.chat_fields import ChatFields
from megatron_multiverse.server.choices import ChoiceAnswer
from megatron_multiverse.server.errors import refuse
from megatron_multiverse.server.logprobs import TokenLogprobs, chat_object, of_answer
from megatron_multiverse.server.messages import Message, plain_turns
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.tool_calls import CLOSE, CallReader, read_calls

router = APIRouter()

TEMPLATE_NAMES = frozenset({"messages", "conversations", "chat_template", "documents", "tools"})
"""Names that the template itself is given."""


@router.post("/v1/chat/completions")
@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    """The next turn of a conversation."""
    fields = await read_fields(request, ChatFields)
    model, limits = request.app.state.model, request.app.state.config.limits
    fields.check(model, limits)
    check_others(fields, refused.CHAT)
    fields.check_tools()
    if (fields.top_logprobs or 0) > limits.max_logprobs:
        raise refuse("top_logprobs", f"{fields.top_logprobs} asked for, at most {limits.max_logprobs} are allowed")
    if fields.top_logprobs and not fields.logprobs:
        raise refuse("top_logprobs", "needs logprobs: true")
    if fields.logprobs and fields.splits_thought:
        raise refuse("logprobs", "not where the thought is apart; set multiverse.separate_reasoning to false")
    for name in ("return_tokenized_data", "return_raw_text"):
        if fields.stream and getattr(fields, name):
            raise refuse(name, "not in streams; leave out stream, or ask for multiverse.return_tree")
    prompt, replayed = await chat_prompt(fields, model)
    max_tokens = _max_tokens(fields, request.app.state.client.facts, len(prompt))
    sampling = fields.sampling(model, limits, max_tokens, fields.top_logprobs or 0)
    asked = Asked(
        prompts=[prompt],
        sampling=sampling,
        count=fields.count,
        cache_salt=fields.salt,
        priority=fields.priority or 0,
        replay_structure=replayed,
        answer_start=await model.tokenize_answer(fields.ours.answer_start),
    )
    return await _Answer(request, fields, [prompt]).respond(asked)


async def chat_prompt(fields: ChatFields, model: ServedModel) -> tuple[list[int], list[tuple[int, int]]]:
    """The conversation as ids; and [start, end) in them of each earlier answer that is to be laid out again, if any.

    Where the last turn of the assistant brings the ids that it was made of (`prevent_retokenization`), they are used as
    they are, and only what comes after it is tokenized: text tokenized again could give other ids than were drawn.

    Raises:
        ApiError: 400, naming what is wrong.
    """
    if not fields.messages:
        raise refuse("messages", "empty; give at least one message")
    variables = _template_variables(fields)
    messages = plain_turns(fields.messages)
    template = model.tool_template if "tools" in variables else model.template
    if any("tool_calls" in message for message in messages) and "tool_calls" not in template:
        raise refuse("messages", "a turn with tool_calls, which the chat template of the model does not show")
    text = await model.render(messages, variables)
    if fields.tool_use.functions and text == await model.render(messages, variables | {"tools": None}):
        raise refuse("tools", "the chat template of the model does not show them; serve it with one that does")
    kept = _kept_ids(fields, model)
    spans: list[tuple[int, int]] = []
    if kept is None:
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
    else:
        count, known = kept
        goes_on = variables["continue_final_message"] and count == len(messages)
        parts = {"add_generation_prompt": False, "continue_final_message": goes_on}
        before = await model.render(messages[:count], variables | parts)
        last = CLOSE if "tool_calls" in messages[count - 1] else messages[count - 1]["content"]
        end = before.rfind(last) + len(last)
        if not last or not text.startswith(before) or end < len(last):
            raise refuse("messages", "this chat template changes earlier turns; set prevent_retokenization to false")
        ids = known + (await model.tokenize([text[end:]]))[0]
        if fields.ours.replay_structure:
            spans = _known_spans(fields.messages, known)
    if not ids:
        raise refuse("messages", "the conversation has no tokens")
    return ids, [(start, end) for start, end in spans if start < end < len(ids)]


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
        # An empty one stands nowhere in the text.
        if message.role == "assistant" and (message.content or message.tool_calls):
            if message.prompt_token_ids is None or message.generation_token_ids is None:
                return None
            ids = [*message.prompt_token_ids, *message.generation_token_ids]
            model.check_ids("messages", ids)
            return count, ids
    return None


def _max_tokens(fields: ChatFields, facts: dict[str, Any], prompt: int) -> int:
    """What was asked for; by default as much as fits the model and its cache."""
    asked = fields.max_completion_tokens if fields.max_completion_tokens is not None else fields.max_tokens
    if asked is not None or not facts:
        return 1 if asked is None else asked
    return max(1, min(facts["max_position"], facts["num_pages"] * facts["page_size"]) - prompt)


class _Answer(ChoiceAnswer[ChatFields]):
    id_prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    has_one_prompt = True

    def __init__(self, request: Request, fields: ChatFields, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(request, fields, prompts)
        self._readers: dict[int, CallReader] = {}  # of the choices of a stream, where calls are read in them

    def whole(self, index: int, result: Result) -> dict[str, Any]:
        split = self.fields.splits_thought
        content, thought = answer_texts(result, self.model.tokenizer, split=split)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        calls = False
        if self.fields.tool_use.may_call:
            content, called = read_calls(content, self.fields.tool_use.most_calls)
            if calls := bool(called):
                message |= {"content": content or None, "tool_calls": [call.whole() for call in called]}
        if split:
            message["reasoning_content"] = thought
        if self.fields.return_tokenized_data or self.fields.prevent_retokenization:
            message |= {"prompt_token_ids": result.prompt_ids, "generation_token_ids": result.token_ids}
            message["generation_log_probs"] = result.logprobs
        if self.fields.return_raw_text:
            message["raw_text"] = self.model.tokenizer.detokenize([*result.prompt_ids, *result.token_ids])
        logprobs = self._logprobs(of_answer(result))
        choice = self.choice(index, {"message": message}, ids=result.token_ids, logprobs=logprobs, result=result)
        return _finished(choice, calls=calls)

    async def opening(self, index: int) -> dict[str, Any]:
        return self.choice(index, {"delta": {"role": "assistant", "content": ""}})  # the role stands only here

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """The last piece of an answer ends with a choice that has no text."""
        delta: dict[str, Any] = {}
        if piece.thought:
            delta["reasoning_content"] = piece.thought
        text, calls, num_calls = self._read(piece)
        if calls:
            delta["tool_calls"] = calls
        tells_tokens = self.fields.logprobs or self.fields.return_token_ids
        if text or piece.branch is not None or (tells_tokens and piece.tokens):
            delta["content"] = text
        choices = []
        if delta:
            content = {"delta": delta} | shapes.branch_label(piece)
            choices.append(self.choice(piece.index, content, ids=piece.ids, logprobs=self._logprobs(piece.tokens)))
        if piece.result is not None:
            choices.append(_finished(self.choice(piece.index, {"delta": {}}, result=piece.result), calls=num_calls > 0))
        return choices

    def _read(self, piece: Piece) -> tuple[str, list[dict[str, Any]], int]:
        """(what is new of the content, what is new of calls, calls so far)."""
        use = self.fields.tool_use
        if not use.may_call:
            return piece.text, [], 0
        reader = self._readers.setdefault(piece.index, CallReader(early=True, most=use.most_calls))
        text, calls = reader.push(piece.text)
        if piece.result is not None:
            text += reader.finish()
        return text, [call.delta() for call in calls], reader.num_calls

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self.fields.logprobs:
            return None
        return chat_object(entries, self.model.tokenizer, as_ids=bool(self.fields.return_tokens_as_token_ids))


def _finished(choice: dict[str, Any], *, calls: bool) -> dict[str, Any]:
    """The last choice of an answer: one that ended by itself with calls waits for their results."""
    return choice | {"finish_reason": "tool_calls"} if calls and choice["finish_reason"] == "stop" else choice
