"""`/tokenizer_info`, `/tokenize`, `/detokenize`: a client that has them needs no tokenizer of its own."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megatron_multiverse.server.body import Fields, check_others, read_fields
from megatron_multiverse.server.chat_fields import ChatFields
from megatron_multiverse.server.chat_prompt import chat_prompt
from megatron_multiverse.server.encode import AnswerResponse
from megatron_multiverse.server.errors import refuse
from megatron_multiverse.server.messages import Message
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.refused import Refused
from megatron_multiverse.server.tools import Tool

router = APIRouter()


REFUSED: Refused = {"chat_template": (), "mm_processor_kwargs": ({},)}
"""Fields of vLLM's route that are not served."""


class TokenizeFields(Fields):
    """Fields of /tokenize: a text, or the turns of a chat with what /v1/chat/completions takes beside them."""

    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    """Whether the texts of the tokens come, too."""
    model: str | None = None


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
    """Ids of a text, or of a chat as /v1/chat/completions reads it.

    With `add_special_tokens` the token that begins texts comes first, if the tokenizer has one.
    """
    fields = await read_fields(request, TokenizeFields)
    check_others(fields, REFUSED)
    model: ServedModel = request.app.state.model
    model.check_name(fields.model)
    if (fields.prompt is None) == (fields.messages is None):
        count = "neither" if fields.prompt is None else "both"
        raise refuse("prompt", f"give either prompt or messages; {count} is given")
    if fields.messages is not None:
        names = ("add_special_tokens", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        given = {name: getattr(fields, name) for name in ("tools", *names)}
        asked = ChatFields(messages=fields.messages, **given)
        ids = (await chat_prompt(asked, model)).ids
    else:
        begin = model.tokenizer.special_tokens().get("bos_token", "") if fields.add_special_tokens else ""
        (ids,) = await model.tokenize([f"{begin}{fields.prompt}"])
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
