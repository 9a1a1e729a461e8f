"""`/tokenizer_info`, `/tokenize`, `/detokenize`: a client that has them needs no tokenizer of its own."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megatron_multiverse.server import refused
from megatron_multiverse.server.body import Fields, check_elsewhere, check_others, read_fields
from megatron_multiverse.server.chat_fields import ChatFields
from megatron_multiverse.server.chat_prompt import chat_prompt
from megatron_multiverse.server.encode import AnswerResponse
from megatron_multiverse.server.errors import refuse
from megatron_multiverse.server.messages import Message
from megatron_multiverse.server.model import ServedModel

router = APIRouter()


class TokenizeFields(ChatFields):
    """Fields of /tokenize: a text, or what /v1/chat/completions takes, so that the ids are those of the same chat."""

    prompt: str | None = None
    messages: list[Message] | None = None  # type: ignore[assignment]  # a chat needs them, a text has none
    return_token_strs: bool | None = None
    """Whether the texts of the tokens come, too."""


class DetokenizeFields(Fields):
    """Fields of /detokenize."""

    tokens: list[int]
    model: str | None = None


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """The tokens that begin, end and fill sequences, and the chat template."""
    model: ServedModel = request.app.state.model
    texts = model.tokenizer.special_tokens()
    names = ("bos_token", "eos_token", "pad_token")
    return JSONResponse({name: texts.get(name) or None for name in names} | {"chat_template": model.template})


@router.post("/tokenize")
@router.post("/v1/tokenize")
async def tokenize(request: Request) -> Response:
    """Ids of a text, or of a chat as /v1/chat/completions reads it, which takes and refuses the same fields.

    With `add_special_tokens` the token that begins texts comes first, if the tokenizer has one; with `add_BOS`, or an
    error says that it has none.
    """
    fields = await read_fields(request, TokenizeFields)
    model: ServedModel = request.app.state.model
    fields.check(model, request.app.state.config.limits)
    check_others(fields, refused.CHAT)
    check_elsewhere(fields)
    if (fields.prompt is None) == (fields.messages is None):
        count = "neither" if fields.prompt is None else "both"
        raise refuse("prompt", f"give either prompt or messages; {count} is given")
    if fields.prompt is None:
        ids = (await chat_prompt(fields, model)).ids
    else:
        (ids,) = await model.tokenize([fields.prompt])
        ids = model.begun(ids) if fields.add_special_tokens else ids
        ids = model.begin_ids("add_BOS") + ids if fields.add_BOS else ids
    longest = request.app.state.client.facts.get("max_position")
    found: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": longest}
    if fields.return_token_strs:
        found["token_strs"] = [model.tokenizer.id_to_text[token] for token in ids]
    return AnswerResponse(found)


@router.post("/detokenize")
@router.post("/v1/detokenize")
async def detokenize(request: Request) -> Response:
    """Text of ids."""
    fields = await read_fields(request, DetokenizeFields)
    model: ServedModel = request.app.state.model
    model.check_name(fields.model)
    model.check_ids("tokens", fields.tokens)
    return JSONResponse({"prompt": await model.detokenize(fields.tokens)})
