"""`/tokenizer_info`, `/tokenize`, `/detokenize`: a client that has them needs no tokenizer of its own."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megatron_multiverse.server.body import Fields, read_fields
from megatron_multiverse.server.model import ServedModel

router = APIRouter()


class TokenizeFields(Fields):
    """Fields of /tokenize."""

    prompt: str
    add_special_tokens: bool | None = None
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
    """Ids of a text. With `add_special_tokens` the token that begins texts comes first, if the tokenizer has one."""
    fields = await read_fields(request, TokenizeFields)
    model: ServedModel = request.app.state.model
    model.check_name(fields.model)
    begin = model.tokenizer.special_tokens().get("bos_token", "") if fields.add_special_tokens else ""
    (ids,) = await model.tokenize([begin + fields.prompt])
    longest = request.app.state.client.facts.get("max_position")
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": longest})


@router.post("/detokenize")
@router.post("/v1/detokenize")
async def detokenize(request: Request) -> Response:
    """Text of ids."""
    fields = await read_fields(request, DetokenizeFields)
    model: ServedModel = request.app.state.model
    model.check_name(fields.model)
    model.check_ids("tokens", fields.tokens)
    return JSONResponse({"prompt": await model.detokenize(fields.tokens)})
