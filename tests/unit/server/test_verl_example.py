"""The example for verl against a real server, with stand-ins of verl 0.9.1's shapes: verl itself needs ray and GPUs."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from megatron_multiverse import patience
from megatron_multiverse.clients.http import ServerError
from tests.scripted_server import scripted_server
from tests.unit.server.running import PROMPT, Running, tokenizer

SAMPLING = {"temperature": 0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
EXAMPLE = Path(__file__).parents[3] / "examples" / "rl" / "verl_agent_loop.py"


class AgentLoopMetrics(BaseModel):
    """verl's."""

    generate_sequences: float = 0.0


class AgentLoopOutput(BaseModel):
    """The fields of verl's that a text-only loop fills; verl takes no others."""

    model_config = ConfigDict(extra="forbid")
    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    response_logprobs: list[float] | None = None
    reward_score: float | None = None
    num_turns: int = 0
    metrics: AgentLoopMetrics
    extra_fields: dict[str, Any] = {}


class AgentLoopBase:
    """What the example uses of verl's base class."""

    def __init__(self, trainer_config: Any, **_: Any) -> None:
        self.rollout_config = trainer_config.config.actor_rollout_ref.rollout

    async def ct_build_initial_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        return tokenizer().tokenize(messages[0]["content"])


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    parts = ["verl", "experimental", "agent_loop", "agent_loop"]
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for thing in (AgentLoopBase, AgentLoopMetrics, AgentLoopOutput):
        monkeypatch.setattr(sys.modules[".".join(parts)], thing.__name__, thing, raising=False)
    spec = importlib.util.spec_from_file_location("verl_agent_loop", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row_of(gold: str) -> dict[str, Any]:
    return {"raw_prompt": [{"role": "user", "content": PROMPT}], "reward_model": {"ground_truth": gold}, "uid": "1"}


def loop_at(url: str, example: Any, most: int = 700) -> Any:
    rollout = SimpleNamespace(response_length=most)
    config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout))
    return example.MultiverseAgentLoop(trainer_config=SimpleNamespace(config=config), url=url)


@pytest.mark.parametrize(("most", "gold", "score"), [(700, "A = 1550; B = 124", 1.0), (120, "A = 1550; B = 124", 0.0)])
def test_verl_gets_an_output_for_each_branch(server: Running, example: Any, most: int, gold: str, score: float) -> None:
    outputs = asyncio.run(loop_at(server.url, example, most).run(SAMPLING, **row_of(gold)))
    ids = tokenizer().tokenize(PROMPT)
    assert [output.extra_fields["branch"] for output in outputs] == ["", "1", "2"]
    for output in outputs:
        assert output.prompt_ids[: len(ids)] == ids and output.reward_score == score
        assert len(output.response_ids) == len(output.response_mask) == len(output.response_logprobs)
        assert any(output.response_mask) and "reward_extra_info" in output.extra_fields
    assert (outputs[-1].extra_fields["left_out_tokens"] > 20) == bool(score)


def test_it_waits_for_a_server_that_starts_again_or_is_full(
    server: Running, example: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "SHORTEST_PAUSE_S", 0.01)
    sampling = {"temperature": 0, "max_new_tokens": 200}
    answer = server.post("/generate", {"text": PROMPT, "sampling_params": sampling, "return_logprob": True}).json()
    passing = [(502, "<html>Bad Gateway</html>"), (503, "soon"), (429, "full")]
    with scripted_server() as scripted:
        scripted.script = {"/generate": [*passing, (200, answer), *passing, (200, answer), (500, "oh")]}
        for _ in range(2):  # verl makes a loop for each
            assert asyncio.run(loop_at(scripted.url, example).run(SAMPLING, **row_of("A = 1")))
        with pytest.raises(ServerError, match="status 500: oh"):
            asyncio.run(loop_at(scripted.url, example).run(SAMPLING, **row_of("A = 1")))
    assert scripted.asked["/generate"] == 9 and caplog.text.count("it is asked again for up to 300 s") == 1
