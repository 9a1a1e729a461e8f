"""Routes that frameworks for reinforcement learning call, in SGLang's shapes, and the whole answer as data."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megatron_multiverse.inference.text.answer import answer_text
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server import shapes
from megatron_multiverse.server.batch import Asked
from megatron_multiverse.server.body import Fields, check_others, read_fields
from megatron_multiverse.server.encode import AnswerResponse
from megatron_multiverse.server.errors import refuse
from megatron_multiverse.server.fields import GenerationFields
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.routes.completions import prompt_ids
from megatron_multiverse.server.serving import complete

router = APIRouter()

DEFAULT_MAX_TOKENS = 128

REFUSED: dict[str, tuple[Any, ...]] = {
    "audio_data": (),
    "custom_logit_processor": (),
    "image_data": (),
    "input_embeds": (),
    "logprob_start_len": (-1,),
    "lora_path": (),
    "priority": (0,),  # with SGLang a larger number comes first; sampling_params take vLLM's
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "session_params": (),
    "stream": (False,),
    "token_ids_logprob": (),
    "video_data": (),
}
"""Fields of the route that are not served, with the values that ask for nothing."""


class SamplingFields(GenerationFields):
    """`sampling_params`: names as SGLang has them where they differ from OpenAI's."""

    takes_defaults = False  # a policy gradient is of the distribution that was drawn from
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None


class GenerateFields(Fields):
    """Fields of /generate."""

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: SamplingFields | None = None
    return_logprob: bool = False
    top_logprobs_num: Annotated[int, Field(ge=0)] = 0
    rid: str | list[str] | None = None
    """Names of the prompts, for /abort_request."""


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
    prompts = await prompt_ids(prompt, model, limits, begin=bool(drawn.add_special_tokens))
    sampling = drawn.sampling(model, limits, drawn.max_new_tokens or DEFAULT_MAX_TOKENS, fields.top_logprobs_num)
    rids = _rids(fields.rid, len(prompts))
    started = time.monotonic()
    asked = Asked(
        prompts=prompts,
        sampling=sampling,
        count=drawn.count,
        cache_salt=drawn.cache_salt,
        priority=drawn.priority or 0,
        rids=rids,
        answer_start=await model.tokenize_answer(drawn.ours.answer_start),
    )
    results = await complete(request, asked)
    seconds = time.monotonic() - started
    versions = request.app.state.client.control.versions
    answers = [
        _answer(fields, model, result, {"id": rids[k // drawn.count], "e2e_latency": round(seconds, 6)}, versions)
        for k, result in enumerate(results)
    ]
    is_one = drawn.count == 1 and (isinstance(prompt, str) or isinstance(prompt[0], int))
    return AnswerResponse(answers[0] if is_one else answers)


def _rids(given: str | list[str] | None, count: int) -> list[str]:
    rids = [given] if isinstance(given, str) else given or [uuid.uuid4().hex for _ in range(count)]
    if len(rids) != count:
        raise refuse("rid", f"{len(rids)} names for {count} prompts; give one for each")
    return rids


@router.get("/server_info")
@router.get("/get_server_info")
async def server_info(request: Request) -> Response:
    """Sizes and state of the server."""
    client = request.app.state.client
    control = dataclasses.asdict(client.control) | {"weight_version": client.control.versions[-1]}
    stats = {name: value for name, value in client.stats.items() if name not in ("step_counts", "step_seconds")}
    facts = {"model_path": request.app.state.model.name, "status": client.condition, **client.facts}
    return JSONResponse(facts | stats | control)


@router.get("/model_info")
@router.get("/get_model_info")
async def model_info(request: Request) -> Response:
    """The model, the version of its weights, and a hash that tells them from others of the same name."""
    state = request.app.state
    control = state.client.control
    weights = {"weight_version": control.versions[-1], "weights": control.weights}
    return JSONResponse({"model_path": state.model.name, "is_generation": True, **weights})


def _answer(
    fields: GenerateFields, model: ServedModel, result: Result, names: dict[str, Any], versions: Sequence[str]
) -> dict[str, Any]:
    written_by = sorted(set(result.weight_versions))
    facts: dict[str, Any] = names | {
        "finish_reason": _finish(result),
        "prompt_tokens": len(result.prompt_ids),
        "completion_tokens": len(result.token_ids),
        "cached_tokens": result.cached_tokens,
        "weight_version": versions[written_by[-1]] if written_by else versions[-1],
        "weight_version_names": {str(number): versions[number] for number in written_by},
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


def _finish(result: Result) -> dict[str, Any]:
    """Why an answer ended, as SGLang says it."""
    found: dict[str, Any] = {"type": result.finish_reason}
    if result.finish_reason == "length":
        found["length"] = len(result.token_ids)
    elif result.finish_reason == "stop":
        ends = {end.parent: end.token for end in result.ends}
        by_token = ends.get(len(result.token_ids) - 1)  # of the text: the end-of-document id, or a stop token
        found["matched"] = by_token if result.stop_reason is None else result.stop_reason
    return found
