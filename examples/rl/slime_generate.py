"""A custom generate function of slime (github.com/THUDM/slime) against our server and its SGLang-shaped /generate:
--custom-generate-function-path slime_generate.generate

One answer becomes several samples: a prefix and what one branch wrote after it, which slime's causal mask and positions
from 0 are right for. What comes after a join is left out, with its number of drawn tokens in the metadata: slime cannot
train it. All samples of an answer share its reward, and no token is trained twice."""

from __future__ import annotations

import copy
from typing import Any

from megatron_multiverse.inference import from_record
from megatron_multiverse.rl.exports import expanded_rows

KEPT = ("temperature", "top_p", "top_k", "max_new_tokens", "stop", "stop_token_ids")
STATUS = {"stop": "completed", "length": "truncated"}


async def generate(args: Any, sample: Any, sampling_params: dict[str, Any]) -> list[Any]:
    from slime.utils.http_utils import post

    sampling = {name: sampling_params[name] for name in KEPT if sampling_params.get(name) is not None}
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    answer = await post(url, {"text": sample.prompt, "sampling_params": sampling, "return_logprob": True})
    result = from_record({**answer["multiverse"]["tree"], "request_id": 0, "error": ""})
    rows, left_out = expanded_rows(result)
    samples = [copy.deepcopy(sample) for _ in rows]
    for one, row in zip(samples, rows, strict=True):
        one.tokens, one.response_length = row.prompt_ids + row.response_ids, len(row.response_ids)
        one.loss_mask, one.rollout_log_probs = row.response_mask, row.response_logprobs
        one.response, one.weight_versions = answer["text"], [str(version) for version in row.weight_versions[-1:]]
        one.status = type(sample).Status(STATUS.get(result.finish_reason, "aborted"))
        one.metadata |= {"branch": row.branch, "left_out_tokens": sum(part.drawn for part in left_out)}
    return samples
