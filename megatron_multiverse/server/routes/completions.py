"""`/v1/completions` and `/completions`: OpenAI's text completions, with Megatron's and vLLM's extensions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from megatron_multiverse.inference.text.answer import answer_text
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server import logprobs, shapes
from megatron_multiverse.server.answer import Piece
from megatron_multiverse.server.batch import Asked
from megatron_multiverse.server.body import check_elsewhere, read_fields
from megatron_multiverse.server.choices import ChoiceAnswer
from megatron_multiverse.server.config import LimitConfig
from megatron_multiverse.server.errors import refuse
from megatron_multiverse.server.fields import Count, GenerationFields, Ids, SeveralIds, Texts
from megatron_multiverse.server.model import ServedModel

router = APIRouter()

DEFAULT_MAX_TOKENS = 16


class CompletionFields(GenerationFields):
    """Fields of the route."""

    prompt: str | Texts | Ids | SeveralIds
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None


@router.post("/v1/completions")
@router.post("/completions")
async def completions(request: Request) -> Response:
    """Continue one prompt or several."""
    fields = await read_fields(request, CompletionFields)
    model, limits = request.app.state.model, request.app.state.config.limits
    fields.check(model, limits)
    check_elsewhere(fields)
    prompts = await prompt_ids(fields.prompt, model, limits, begin=bool(fields.add_special_tokens))
    max_tokens = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    if max_tokens == 0 and (fields.stream or not fields.echo):
        raise refuse("max_tokens", "0 asks for nothing but the prompt, which needs echo, and no stream")
    if fields.logprobs is not None:
        if fields.logprobs > limits.max_logprobs:
            raise refuse("logprobs", f"{fields.logprobs} alternatives, at most {limits.max_logprobs} are allowed")
        if fields.stream and fields.echo:
            raise refuse("logprobs", "those of the prompt do not come in streams; leave out echo, stream or logprobs")
    scored = fields.logprobs if fields.echo else None
    # The engine writes at least one token. Where none is asked for, it is left out of the answer.
    sampling = fields.sampling(model, limits, max(1, max_tokens), fields.logprobs or 0, scored)
    asked = Asked(
        prompts=prompts,
        sampling=sampling,
        count=fields.count,
        cache_salt=fields.salt,
        priority=fields.priority or 0,
        answer_start=await model.tokenize_answer(fields.ours.answer_start),
    )
    return await _Answer(request, fields, prompts).respond(asked)


async def prompt_ids(
    prompt: str | list[str] | list[int] | list[list[int]],
    model: ServedModel,
    limits: LimitConfig,
    *,
    param: str = "prompt",
    begin: bool = False,
) -> list[list[int]]:
    """Ids of each prompt of a field that holds one or several, as texts or as ids.

    Args:
        prompt: the field.
        model: that is served.
        limits: of the server.
        param: name of the field.
        begin: put the token that begins texts before texts.

    Raises:
        ApiError: 400, naming what is wrong.
    """
    is_one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
    prompts: list[Any] = [prompt] if is_one else list(prompt)
    if not 1 <= len(prompts) <= limits.max_prompts:
        raise refuse(param, f"{len(prompts)} prompts, 1 to {limits.max_prompts} are allowed")
    are_texts = isinstance(prompts[0], str)
    ids: list[list[int]] = await model.tokenize(prompts) if are_texts else prompts
    if begin and are_texts:
        ids = [model.begun(one) for one in ids]
    if not are_texts:
        await model.check_prompts(param, ids)
    if not all(ids):
        raise refuse(param, "an empty prompt; give at least one token")
    return ids


def without_tokens(result: Result) -> Result:
    """The result of a request that asked for no token: what the engine knows of the prompt."""
    return dataclasses.replace(
        result,
        token_ids=[],
        position_ids=[],
        logprobs=[],
        top_logprobs=None if result.top_logprobs is None else [],
        labels=[],
        parents=[],
        blocks=[],
        stops=[],
        stop_reason=None,
        critical_tokens=0,
        finish_reason="length",
    )


class _Answer(ChoiceAnswer[CompletionFields]):
    id_prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    has_one_prompt = False

    def __init__(self, request: Request, fields: CompletionFields, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(request, fields, prompts)
        self._as_ids = bool(fields.return_tokens_as_token_ids)
        self._offsets: Counter[int] = Counter()  # characters of the tokens that each choice of a stream has told of

    def shown(self, result: Result) -> Result:
        return without_tokens(result) if self.fields.max_tokens == 0 else result

    def whole(self, index: int, result: Result) -> dict[str, Any]:
        tokenizer = self.model.tokenizer
        text = tokenizer.detokenize(result.prompt_ids) if self.fields.echo else ""
        text += answer_text(result, tokenizer.detokenize)
        found = None
        if self.fields.logprobs is not None:
            entries = logprobs.of_prompt(result) if self.fields.echo else []
            is_empty = not result.token_ids and self.fields.max_tokens != 0
            entries += logprobs.of_answer(result)
            found = logprobs.completion_object(entries, tokenizer, as_ids=self._as_ids, is_empty=is_empty)
        return self.choice(index, {"text": text}, ids=result.token_ids, logprobs=found, result=result)

    async def opening(self, index: int) -> dict[str, Any]:
        prompt = self.prompts[index // self.fields.count]
        return self.choice(index, {"text": await self.model.detokenize(prompt) if self.fields.echo else ""})

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        found = None
        if self.fields.logprobs is not None:
            tokenizer, offset = self.model.tokenizer, self._offsets[piece.index]
            found = logprobs.completion_object(piece.tokens, tokenizer, as_ids=self._as_ids, offset=offset)
            self._offsets[piece.index] += sum(len(tokenizer.id_to_text[token]) for token in piece.ids)
        content = {"text": piece.text} | shapes.branch_label(piece)
        return [self.choice(piece.index, content, ids=piece.ids, logprobs=found, result=piece.result)]
