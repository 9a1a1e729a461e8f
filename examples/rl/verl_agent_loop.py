"""An agent loop of verl 0.9 (github.com/volcengine/verl) that draws its answers from our server, in the file that
actor_rollout_ref.rollout.agent.agent_loop_config_path names:
- {name: multiverse, _target_: verl_agent_loop.MultiverseAgentLoop, url: "http://127.0.0.1:5000"}

One answer becomes several outputs: a prefix and what one branch wrote after it, which verl's causal mask and positions
from 0 are right for. What comes after a join is left out, and counted in the extra fields. verl would grade the text of
the last output, which is a path: the whole answer is graded here, and verl gives all outputs this one score.

A server that starts again or is full is waited for at each answer, for up to five minutes."""

from __future__ import annotations

import functools
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput

from megatron_multiverse.clients.http import connect, post
from megatron_multiverse.grading import is_right, stated_answer
from megatron_multiverse.inference import from_record
from megatron_multiverse.patience import BUSY, Patience
from megatron_multiverse.rl.exports import expanded_rows

LONGEST_ANSWER_S = 3600.0
PATIENCE = functools.cache(Patience)  # verl makes a loop for each answer; that a server is waited for is said once
ROW = ("prompt_ids", "response_ids", "response_mask", "response_logprobs")


class MultiverseAgentLoop(AgentLoopBase):  # type: ignore[misc]  # verl is not installed here
    def __init__(self, *args: Any, url: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.url = url

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> list[AgentLoopOutput]:
        ids = await self.ct_build_initial_tokens(list(row["raw_prompt"]))
        sampling = {name: sampling_params[name] for name in ("temperature", "top_p", "top_k")}
        sampling["max_new_tokens"] = self.rollout_config.response_length
        asked = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}
        async with connect(self.url, timeout=LONGEST_ANSWER_S) as client:
            answer = await post(client, "/generate", asked, PATIENCE(self.url).question(BUSY))
        result = from_record({**answer["multiverse"]["tree"], "request_id": 0, "error": ""})
        rows, left_out = expanded_rows(result)
        score = float(is_right(row["reward_model"]["ground_truth"], stated_answer(answer["text"])))
        left_out_tokens = sum(part.drawn for part in left_out)
        return [
            AgentLoopOutput(
                **{name: getattr(one, name) for name in ROW},
                reward_score=score,
                metrics=AgentLoopMetrics(),
                extra_fields={"branch": one.branch, "left_out_tokens": left_out_tokens, "reward_extra_info": {}},
            )
            for one in rows
        ]
