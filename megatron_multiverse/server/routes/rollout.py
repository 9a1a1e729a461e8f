"""Routes that frameworks for reinforcement learning call, in SGLang's shapes, and the whole answer as data."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megatron_multiverse.inference.text.answer import answer_text
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server import shapes
from megatron_multiverse.server.body import Fields, check_others, read_fields
from megatron_multiverse.server.errors import refuse
from megatron_multiverse.server.fields import GenerationFields
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.routes.completions import prompt_ids
from megatron_multiverse.server.serving import Asked, complete

router = APIRouter()

DEFAULT_MAX_TOKENS = 128

REFUSED: dict[str, tuple[Any, ...]] = {
    "image_data": (),
    "logprob_start_len": (-1,),
    "lora_path": (),
    "return_hidden_states": (False,),
    "stream": (False,),
    "token_ids_logprob": (),
}
"""Fields of the route that are not served, with the values that ask for nothing."""


class SamplingFields(GenerationFields):
    """`sampling_params`: names as SGLang has them where they differ from OpenAI's."""

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None


class GenerateFields(Fields):
    """Fields of /generate."""

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: SamplingFields | None = None
    return_logprob: bool = False
    top_logprobs_num: Annotated[int, Field(ge=0)] = 0
    rid: str | None = None


@router.post("/generate")
async def generate(request: Request) -> Response:
    """Continue one prompt or several; ids in, ids and their log-probabilities out.

    Beside SGLang's fields each answer has `multiverse`, with everything known of every token: position, visibility
    label, parent, log-probability, whether it was drawn or forced.
    """
    fields = await read_fields(request, GenerateFields)
    check_others(fields, REFUSED)
    model, limits = request.app.state.model, request.app.state.config.limits
    if (fields.text is None) == (fields.input_ids is None):
        raise refuse("input_ids", "give either text or input_ids")
    prompt = fields.text if fields.text is not None else fields.input_ids
    assert prompt is not None
    drawn = fields.sampling_params or SamplingFields()
    drawn.check(model, limits)
    if fields.top_logprobs_num > limits.max_logprobs:
        raise refuse("top_logprobs_num", f"at most {limits.max_logprobs} are allowed")
    prompts = await prompt_ids(prompt, model, limits)
    sampling = drawn.sampling(model, limits, drawn.max_new_tokens or DEFAULT_MAX_TOKENS, fields.top_logprobs_num)
    started = time.monotonic()
    results = await complete(request, Asked(prompts=prompts, sampling=sampling, count=drawn.count))
    seconds = time.monotonic() - started
    answers = [_answer(fields, model, result, seconds) for result in results]
    is_one = drawn.count == 1 and (isinstance(prompt, str) or isinstance(prompt[0], int))
    return JSONResponse(answers[0] if is_one else answers)


@router.get("/server_info")
async def server_info(request: Request) -> Response:
    """Sizes and state of the server."""
    state = request.app.state
    return JSONResponse(
        {"model_path": state.model.name, "status": state.client.condition, **state.client.facts, **state.client.stats}
    )


def _answer(fields: GenerateFields, model: ServedModel, result: Result, seconds: float) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "id": fields.rid or uuid.uuid4().hex,
        "finish_reason": {"type": result.finish_reason},
        "prompt_tokens": len(result.prompt_ids),
        "completion_tokens": len(result.token_ids),
        "cached_tokens": result.cached_tokens,
        "e2e_latency": round(seconds, 6),
    }
    if fields.return_logprob:
        # Forced tokens were not drawn: their log-probability is null, and they take no part in a policy gradient.
        facts["output_token_logprobs"] = [
            [logprob, token, None] for logprob, token in zip(result.logprobs, result.token_ids, strict=True)
        ]
        if fields.top_logprobs_num:
            facts["output_top_logprobs"] = [
                None if top is None else [[logprob, token, None] for token, logprob in top]
                for top in result.top_logprobs or []
            ]
    return {
        "text": answer_text(result, model.tokenizer.detokenize),
        "output_ids": result.token_ids,
        "meta_info": facts,
        "multiverse": shapes.multiverse(result, tree=True),
    }
