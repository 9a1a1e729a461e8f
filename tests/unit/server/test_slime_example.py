"""The example for slime against a real server, with stand-ins of slime's documented shapes: slime itself needs GPUs."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.unit.server.running import PROMPT, Running, tokenizer

EXAMPLE = Path(__file__).parents[3] / "examples" / "rl" / "slime_generate.py"


@dataclass
class Sample:
    """The fields of slime.utils.types.Sample that a custom generate function fills."""

    class Status(Enum):
        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"

    prompt: str
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(("most", "status"), [(700, Sample.Status.COMPLETED), (120, Sample.Status.TRUNCATED)])
def test_slime_gets_a_sample_for_each_branch(
    server: Running, monkeypatch: pytest.MonkeyPatch, most: int, status: Sample.Status
) -> None:
    async def post(url: str, payload: dict[str, Any]) -> Any:
        assert url == f"{server.url}/generate"
        response = server.post("/generate", payload)
        assert response.status_code == 200, response.text
        return response.json()

    http = ModuleType("slime.utils.http_utils")
    http.post = post  # type: ignore[attr-defined]
    for name, module in {
        "slime": ModuleType("slime"),
        "slime.utils": ModuleType("slime.utils"),
        http.__name__: http,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("slime_generate", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    host, port = server.url.removeprefix("http://").split(":")
    args = SimpleNamespace(sglang_router_ip=host, sglang_router_port=port)
    sampling = {"temperature": 0, "max_new_tokens": most, "top_p": 1.0, "top_k": -1, "skip_special_tokens": False}
    samples = asyncio.run(example.generate(args, Sample(PROMPT), sampling))
    ids = tokenizer().tokenize(PROMPT)
    assert len(samples) == 3 and [sample.metadata["branch"] for sample in samples] == ["", "1", "2"]
    for sample in samples:
        assert sample.tokens[: len(ids)] == ids and sample.status is status and sample.weight_versions == ["0"]
        length = sample.response_length
        assert len(sample.loss_mask) == len(sample.rollout_log_probs) == length < len(sample.tokens)
        assert any(sample.loss_mask) and all(
            m or p == 0 for m, p in zip(sample.loss_mask, sample.rollout_log_probs, strict=True)
        )
    assert (
        tokenizer()
        .detokenize(samples[1].tokens[-samples[1].response_length :])
        .startswith("\n<Path>\n1: A = 583 + 967")
    )
    assert (samples[0].metadata["left_out_tokens"] > 20) == (status is Sample.Status.COMPLETED)
