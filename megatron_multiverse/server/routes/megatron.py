"""`PUT /api`: the route of Megatron-LM's text-generation server."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server import logprobs, refused, shapes
from megatron_multiverse.server.batch import Asked
from megatron_multiverse.server.body import Fields, check_elsewhere, check_others, read_fields
from megatron_multiverse.server.encode import AnswerResponse
from megatron_multiverse.server.errors import refuse
from megatron_multiverse.server.fields import Count, MultiverseFields, Number, Seed, make_sampling
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.routes.completions import without_tokens
from megatron_multiverse.server.serving import complete

router = APIRouter()


class ApiFields(Fields):
    """Fields of the route, with the bounds that Megatron's server has for them."""

    prompts: list[str]
    tokens_to_generate: Count = 64
    temperature: Annotated[Number, Field(gt=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1000)] = 0
    top_p: Annotated[Number, Field(ge=0, le=1)] = 0.0
    logprobs: bool = False
    add_BOS: bool = False
    random_seed: Annotated[Seed, Field(ge=0)] | None = None
    stop_token: int | None = None
    stop_on_eol: bool = False
    multiverse: MultiverseFields | None = None


@router.put("/api")
async def api(request: Request) -> Response:
    """Continue prompts: `text`, `segments` and `tokens` hold prompt and answer together."""
    fields = await read_fields(request, ApiFields)
    model, limits = request.app.state.model, request.app.state.config.limits
    check_others(fields, refused.REFUSED | refused.API)
    check_elsewhere(fields)
    if not 1 <= len(fields.prompts) <= limits.max_prompts:
        raise refuse("prompts", f"{len(fields.prompts)} prompts, 1 to {limits.max_prompts} are allowed")
    if fields.tokens_to_generate == 0 and not fields.logprobs:
        raise refuse("tokens_to_generate", "0 asks for nothing but the prompt, which needs logprobs")
    ours = fields.multiverse or MultiverseFields()
    ours.check(is_chat=False, stream=False)
    prompts = await _prompts(fields, model)
    stop = [] if fields.stop_token is None else [fields.stop_token]
    model.check_ids("stop_token", stop)
    sampling = make_sampling(
        ours,
        max_tokens=max(1, fields.tokens_to_generate),
        prompt_logprobs=0 if fields.logprobs else None,
        stop=("\n",) if fields.stop_on_eol else (),
        temperature=0.0 if fields.top_k == 1 else float(fields.temperature),
        top_k=fields.top_k,
        top_p=float(fields.top_p) or 1.0,  # 0 is off there
        seed=fields.random_seed,
        stop_token_ids=(*stop, *model.end_ids),
    )
    start = await model.tokenize_answer(ours.answer_start)
    results = await complete(request, Asked(prompts=prompts, sampling=sampling, answer_start=start))
    if fields.tokens_to_generate == 0:
        results = [without_tokens(result) for result in results]
    return AnswerResponse(await _answer(fields, model, results))


async def _prompts(fields: ApiFields, model: ServedModel) -> list[list[int]]:
    begin = model.begin_ids("add_BOS") if fields.add_BOS else []
    prompts = [begin + ids for ids in await model.tokenize(fields.prompts)]
    if not all(prompts):
        raise refuse("prompts", "an empty prompt; give at least one token, or add_BOS")
    return prompts


async def _answer(fields: ApiFields, model: ServedModel, results: list[Result]) -> dict[str, Any]:
    tokens = [[*result.prompt_ids, *result.token_ids] for result in results]
    pieces = model.tokenizer.id_to_text
    answer: dict[str, Any] = {
        "text": [await model.detokenize(ids) for ids in tokens],
        "segments": [[pieces[token] for token in ids] for ids in tokens],
        "tokens": tokens,
    }
    if fields.logprobs:
        # As Megatron has them: none for the first token, one for each other token of prompt and answer.
        answer["logprobs"] = [
            [entry.logprob for entry in [*logprobs.of_prompt(result)[1:], *logprobs.of_answer(result)]]
            for result in results
        ]
    if fields.multiverse is not None:
        answer["multiverse"] = [shapes.multiverse(result, tree=fields.multiverse.return_tree) for result in results]
        answer["usage"] = shapes.usage(results, [result.prompt_ids for result in results])
    return answer
