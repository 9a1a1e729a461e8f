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
from megatron_multiverse.server import refused, shapes
from megatron_multiverse.server.batch import Asked
from megatron_multiverse.server.body import Fields, check_elsewhere, check_others, read_fields
from megatron_multiverse.server.encode import AnswerResponse
from megatron_multiverse.server.errors import refuse
from megatron_multiverse.server.fields import Count, GenerationFields, Ids, Seed, SeveralIds, Texts, joined_salt
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.routes.completions import prompt_ids
from megatron_multiverse.server.serving import complete

router = APIRouter()

DEFAULT_MAX_TOKENS = 128


class SamplingFields(GenerationFields):
    """`sampling_params`: names as SGLang has them where they differ from OpenAI's."""

    takes_defaults = False  # a policy gradient is of the distribution that was drawn from
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    min_new_tokens: Count | None = None
    """`min_tokens`."""
    sampling_seed: Seed | None = None
    """`seed`."""

    def model_post_init(self, context: Any) -> None:
        """SGLang's name counts where it is given."""
        self.min_tokens = self.min_tokens if self.min_new_tokens is None else self.min_new_tokens
        self.seed = self.seed if self.sampling_seed is None else self.sampling_seed


class GenerateFields(Fields):
    """Fields of /generate."""

    text: str | Texts | None = None
    input_ids: Ids | SeveralIds | None = None
    sampling_params: SamplingFields | None = None
    return_logprob: bool | None = None
    top_logprobs_num: Annotated[int, Field(ge=0)] | None = None
    return_text_in_logprobs: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    extra_key: Annotated[str, Field(max_length=256)] | None = None
    rid: str | list[str] | None = None
    """Names of the prompts, for /abort_request."""


@router.post("/generate")
async def generate(request: Request) -> Response:
    """Continue one prompt or several; ids in, ids and their log-probabilities out.

    Beside SGLang's fields each answer has `multiverse`, with everything known of every token: position, visibility
    label, parent, log-probability, whether it was drawn or forced.
    """
    fields = await read_fields(request, GenerateFields)
    check_others(fields, refused.REFUSED | refused.GENERATE)
    check_elsewhere(fields, ("sampling_params", SamplingFields))
    model, limits = request.app.state.model, request.app.state.config.limits
    if (fields.text is None) == (fields.input_ids is None):
        found = "neither" if fields.text is None else "both"
        raise refuse("input_ids", f"give either text or input_ids; {found} is given")
    param, prompt = ("input_ids", fields.input_ids) if fields.text is None else ("text", fields.text)
    assert prompt is not None
    drawn = fields.sampling_params or SamplingFields()
    drawn.check(model, limits)
    check_others(drawn, refused.SAMPLING, "; /generate has max_new_tokens, return_logprob and top_logprobs_num")
    check_elsewhere(drawn)
    num_top = fields.top_logprobs_num or 0
    if num_top > limits.max_logprobs:
        raise refuse("top_logprobs_num", f"{num_top} asked for, at most {limits.max_logprobs} are allowed")
    prompts = await prompt_ids(prompt, model, limits, param=param, begin=bool(drawn.add_special_tokens))
    sampling = drawn.sampling(model, limits, drawn.max_new_tokens or DEFAULT_MAX_TOKENS, num_top)
    rids = _rids(fields.rid, len(prompts))
    started = time.monotonic()
    asked = Asked(
        prompts=prompts,
        sampling=sampling,
        count=drawn.count,
        cache_salt=joined_salt(fields.cache_salt or drawn.cache_salt, fields.extra_key or drawn.extra_key),
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
    """The model, the version of its weights, a hash that tells them from others of the same name, and on what it runs:
    `device` is what one rank has, None until the model is loaded."""
    client = request.app.state.client
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    return JSONResponse(
        {
            "model_path": request.app.state.model.name,
            "is_generation": True,
            "weight_version": client.control.versions[-1],
            "weights": client.control.weights,
            "device": client.facts.get("device"),
            **{size: getattr(client.config, size) for size in sizes},
        }
    )


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
        texts = model.tokenizer.id_to_text if fields.return_text_in_logprobs else None

        def told(token: int, logprob: float | None) -> list[Any]:
            return [logprob, token, None if texts is None else texts[token]]

        # Forced tokens were not drawn: their log-probability is null, and they take no part in a policy gradient.
        facts["output_token_logprobs"] = list(map(told, result.token_ids, result.logprobs))
        if fields.top_logprobs_num:
            facts["output_top_logprobs"] = [
                None if top is None else [told(*pair) for pair in top] for top in result.top_logprobs or []
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
