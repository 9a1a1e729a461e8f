"""How answers are drawn where a request does not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.server.config import LimitConfig, ServerConfig
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.routes.chat import ChatFields
from megatron_multiverse.server.routes.rollout import SamplingFields
from tests.unit.server.running import tokenizer

ADVISED = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
OPENAI = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def served(folder: Path, defaults: Literal["openai", "model"], **values: Any) -> ServedModel:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return ServedModel(ServerConfig(load=folder, sampling_defaults=defaults), tokenizer())


def drawn(model: ServedModel, fields: ChatFields | SamplingFields) -> dict[str, float]:
    sampling = fields.sampling(model, LimitConfig(), 10)
    return {name: getattr(sampling, name) for name in OPENAI}


def chat(**fields: Any) -> ChatFields:
    return ChatFields(messages=[], **fields)


def test_the_models_own_are_taken_if_the_server_is_to(tmp_path: Path) -> None:
    model = served(tmp_path, "model", do_sample=True, **ADVISED)
    assert drawn(model, chat()) == ADVISED
    assert drawn(model, chat(temperature=0, top_k=-1)) == ADVISED | {"temperature": 0.0, "top_k": 0}
    assert drawn(model, chat(min_p=0.0, top_p=1.0)) == ADVISED | {"min_p": 0.0, "top_p": 1.0}
    assert drawn(model, SamplingFields()) == OPENAI, "a policy gradient is of the model's own distribution"
    assert drawn(served(tmp_path, "model", do_sample=False, **ADVISED), chat()) == OPENAI
    assert drawn(served(tmp_path, "model", do_sample=True, top_k=None), chat()) == OPENAI


def test_by_itself_the_server_names_them_and_takes_openais(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert drawn(served(tmp_path, "openai", do_sample=True, **ADVISED), chat()) == OPENAI
    assert any("--sampling-defaults model" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_p": 1.5}, {"top_k": -1}, {"repetition_penalty": 0}])
def test_values_that_are_none_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"generation_config.json: .* does not lie in"):
        served(tmp_path, "openai", do_sample=True, **wrong)
