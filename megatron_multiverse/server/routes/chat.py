"""`/v1/chat/completions` and `/chat/completions`: OpenAI's chat, with Megatron's and vLLM's extensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server import refused, shapes
from megatron_multiverse.server.answer import Piece, answer_texts
from megatron_multiverse.server.batch import Asked
from megatron_multiverse.server.body import check_elsewhere, check_others, read_fields
from megatron_multiverse.server.chat_fields import ChatFields
from megatron_multiverse.server.chat_prompt import chat_prompt
from megatron_multiverse.server.choices import ChoiceAnswer
from megatron_multiverse.server.errors import refuse
from megatron_multiverse.server.logprobs import TokenLogprobs, chat_object, of_answer
from megatron_multiverse.server.tool_calls import CallReader, read_calls

router = APIRouter()


@router.post("/v1/chat/completions")
@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    """The next turn of a conversation."""
    fields = await read_fields(request, ChatFields)
    model, limits = request.app.state.model, request.app.state.config.limits
    fields.check(model, limits)
    check_others(fields, refused.CHAT)
    check_elsewhere(fields)
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
    prompt = await chat_prompt(fields, model)
    max_tokens = _max_tokens(fields, request.app.state.client.facts, len(prompt.ids))
    sampling = fields.sampling(model, limits, max_tokens, fields.top_logprobs or 0)
    asked = Asked(
        prompts=[prompt.ids],
        sampling=sampling,
        count=fields.count,
        cache_salt=fields.salt,
        priority=fields.priority or 0,
        replay_structure=prompt.answers,
        answer_start=await model.tokenize_answer(fields.ours.answer_start),
        thought=prompt.thought,
    )
    return await _Answer(request, fields, [prompt.ids], in_thought=prompt.thought == "open").respond(asked)


def _max_tokens(fields: ChatFields, facts: dict[str, Any], prompt: int) -> int:
    """What was asked for; by default as much as fits the model and its cache."""
    asked = fields.max_completion_tokens if fields.max_completion_tokens is not None else fields.max_tokens
    if asked is not None or not facts:
        return 1 if asked is None else asked
    return max(1, min(facts["max_position"], facts["num_pages"] * facts["page_size"]) - prompt)


class _Answer(ChoiceAnswer[ChatFields]):
    id_prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    has_one_prompt = True

    def __init__(
        self, request: Request, fields: ChatFields, prompts: Sequence[Sequence[int]], *, in_thought: bool
    ) -> None:
        super().__init__(request, fields, prompts, in_thought=in_thought)
        self._readers: dict[int, CallReader] = {}  # of the choices of a stream, where calls are read in them

    def whole(self, index: int, result: Result) -> dict[str, Any]:
        split = self.fields.splits_thought
        content, thought = answer_texts(result, self.model.tokenizer, split=split, in_thought=self.in_thought)
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
