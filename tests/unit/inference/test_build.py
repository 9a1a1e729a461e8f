"""The example of docs/engine.md runs as it is written, and an engine sizes its cache by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_multiverse.config import EngineConfig
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.dtypes import engine_dtype
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference import build
from megatron_multiverse.inference.build import fitting_pages
from megatron_multiverse.inference.step.forward import KVStore
from megatron_multiverse.inference.step.quantize import quantize_products
from megatron_multiverse.model.families import preset

from .toy import ToyModel, ask, toy_engine

ROOT = Path(__file__).parents[3]


def test_the_example_answers_in_parallel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "engine.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    exec(example, names)
    shown = capsys.readouterr().out
    assert "<Path>" in shown and "</Conclusion>" in shown
    engine, result = names["engine"], names["result"]
    assert engine.config.num_pages == EngineConfig().pages_for(4096)  # type: ignore[attr-defined]
    assert result.num_parallel > 1  # type: ignore[attr-defined]


def test_a_cache_without_a_size_holds_eight_of_the_longest_answers() -> None:
    engine = toy_engine(ToyModel(), num_pages=0, page_size=16, max_position=320)
    assert engine.book.num_pages == 8 * (20 + 16)
    assert len(engine.generate([ask([30] * 10, max_tokens=300, ignore_eos=True)])[0].token_ids) == 300


def test_the_cache_takes_no_more_than_the_model_leaves_free() -> None:
    assert fitting_pages(100, 1000, None) == 100
    assert fitting_pages(100, 1000, 10**9) == 100
    assert fitting_pages(100, 1000, 50_000) == 42, "85 % of what is free"
    with pytest.raises(ConfigError, match="leaves 1 MiB of the GPU free"):
        fitting_pages(100, 10**6, 10**6)


def test_an_engine_of_a_checkpoint_fits_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ROOT / "examples" / "quickstart" / "model"
    tokenizer = build_tokenizer("HuggingFaceTokenizer", model)
    monkeypatch.setattr(build, "free_bytes", lambda device: 3 << 20)
    engine = build.build_engine(model, tokenizer, EngineConfig(page_size=16))
    store = engine.runner.store
    page = KVStore.page_bytes(engine.runner.model, 16)
    assert (store.keys.nbytes + store.values.nbytes) == page * (engine.book.num_pages + 1), "one page nobody owns"
    left = (3 << 20) / 2  # a step of 8,192 tokens would take more than that
    assert 0.85 * left - page < engine.book.num_pages * page <= 0.85 * left
    small = build.build_engine(model, tokenizer, EngineConfig(page_size=16, max_step_tokens=1))
    assert 0.85 * (3 << 20) - 2 * page < small.book.num_pages * page <= 0.85 * (3 << 20)
    asked = build.build_engine(model, tokenizer, EngineConfig(page_size=16, num_pages=500))
    assert asked.book.num_pages == 500


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "qwen2.5-7b"])
def test_steps_take_as_much_memory_as_was_measured(name: str) -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "engine_chunks_h200.json").read_text())["runs"]
    peaks = {run["max_step_tokens"]: run["peak_GiB"] * 2**30 for run in found if run["model"] == name}
    told = [build.step_bytes(preset(name), tokens, torch.bfloat16) for tokens in (2048, 16384)]
    assert told[1] - told[0] == pytest.approx(peaks[16384] - peaks[2048], rel=0.12)


def test_an_engine_in_fp8_measures_its_cache_beside_weights_that_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ROOT / "examples" / "quickstart" / "model"
    order = []

    def round_weights(*args: Any) -> None:
        order.append("rounded")
        quantize_products(*args)

    def measure(device: torch.device) -> int:
        order.append("measured")
        return 3 << 20

    monkeypatch.setattr(build, "quantize_products", round_weights)
    monkeypatch.setattr(build, "free_bytes", measure)
    build.build_engine(model, build_tokenizer("HuggingFaceTokenizer", model), EngineConfig(quantization="fp8"))
    assert order == ["rounded", "measured"]


def test_the_format_of_an_engine_is_that_of_its_device() -> None:
    assert engine_dtype("auto", torch.device("cpu")) is torch.float32
    assert engine_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert engine_dtype("float64", torch.device("cuda")) is torch.float64
