"""The engine beside vLLM: two processes measure in turn; a stand-in for vLLM answers with a token per step."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.beside_vllm.__main__ import BesideConfig, cases_of, longest, measure, show, sides_of, told, vllm_config
from benchmarks.beside_vllm.process import WorkerProcess
from benchmarks.beside_vllm.theirs import OWN, Client
from benchmarks.beside_vllm.worker import step_figures
from megatron_multiverse.errors import ConfigError

STAND_IN = """
from types import SimpleNamespace

__version__ = "stand-in"
SamplingParams = SimpleNamespace
PROMPTS = []


class Engine:
    def __init__(self):
        self.left = {}

    def add_request(self, key, prompt, sampling):
        PROMPTS.append(prompt["prompt_token_ids"])
        self.left[key] = sampling.max_tokens

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        found = [SimpleNamespace(request_id=key, outputs=[SimpleNamespace(token_ids=[7])]) for key in self.left]
        self.left = {key: left - 1 for key, left in self.left.items() if left > 1}
        return found


class LLM:
    def __init__(self, **options):
        self.llm_engine = Engine()
"""


@pytest.fixture
def vllm_path(tmp_path: Path) -> Path:
    folder = tmp_path / "site" / "vllm"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(STAND_IN, encoding="utf-8")
    (folder / "sampling_params.py").write_text("class RequestOutputKind:\n    DELTA = 1\n", encoding="utf-8")
    return folder.parent


@pytest.fixture
def client(vllm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.syspath_prepend(vllm_path)
    yield Client({"config": {"vocab_size": 512}, "folder": str(tmp_path / "model"), "options": {}})
    for name in ("vllm", "vllm.sampling_params"):
        sys.modules.pop(name, None)


def test_both_engines_measure_in_turn(
    vllm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    config = BesideConfig(
        vllm_path=vllm_path,
        parts=("block", "decode-7b", "uneven-7b"),
        block_preset="tiny",
        dtype="float32",
        prefix=32,
        path_tokens=20,
        batch=(2, 9),
        context=16,
        uneven_context=(4, 20),
        new_tokens=16,
        rounds=2,
    )
    begun, *rows = measure(config, tmp_path)
    assert begun["vllm"]["vllm"] == "stand-in" and begun["ours"]["gpu"] == "CPU"
    assert [(row["part"], row["case"].get("batch"), row["side"], row["round"]) for row in rows] == [
        (part, batch, side, number)
        for part, batch in (("block", None), ("decode-7b", 2), ("decode-7b", 9), ("uneven-7b", 9))
        for number in (0, 1)
        for side in ("ours", "vllm")
    ]
    assert all(row["ms_per_step"] > 0 and row["seconds"] > 0 for row in rows)
    assert rows[0]["cached_tokens"] == 16  # the page that holds the last token is read again
    assert list(temporary.glob("*/config.json")) == [], "what killed processes wrote is in the folder of the run"
    show(rows)
    shown = capfd.readouterr().out
    assert all(what in shown for what in ("prefix 32", "9 x 16 ", "9 x 4..20 "))


def test_a_join_reads_what_the_paths_wrote(client: Client, tmp_path: Path) -> None:
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == {"vocab_size": 512}
    figures = client.measure({"kind": "block", "prefix": 32, "paths": 3, "tokens": 20, "conclusion": 4})
    prefix, *paths, join = sys.modules["vllm"].PROMPTS
    assert all(len(path) == 32 + OWN and path[:32] == prefix for path in paths)
    assert join == prefix + [token for path in paths for token in [*path[32:], *[7] * 20]]
    assert figures["steps"] == 20 - 1 - 8  # the first one begins the answers, eight settle
    assert figures["join_to_first_token_seconds"] <= figures["seconds"]


def test_prompts_of_unequal_length_are_those_of_all_engines(client: Client) -> None:
    case = told({"kind": "decode", "batch": 20, "shortest": 5, "context": 43, "tokens": 12})
    client.measure(case)
    lengths = [len(prompt) for prompt in sys.modules["vllm"].PROMPTS]
    assert lengths == case["lengths"] != sorted(lengths) == list(range(5, 44, 2))
    assert told({"kind": "decode", "batch": 3, "context": 43})["lengths"] == [43] * 3


def test_an_engine_that_ends_or_is_late_costs_its_own_figures_alone(tmp_path: Path) -> None:
    ended = WorkerProcess("ended", "no_such_module", {}, {}, tmp_path)
    late = WorkerProcess("late", "timeit", {}, {}, tmp_path)  # says nothing before it ends
    late.wait_until_ready(time.monotonic())
    ended.wait_until_ready(time.monotonic() + 60)
    assert ended.failed == "it has ended: see its log" and late.failed == "it was not ready in time"
    assert ended.measure({}, time.monotonic() + 60) is None and late.measure({}, time.monotonic() + 60) is None
    assert "no_such_module" in (tmp_path / "ended.log").read_text(encoding="utf-8")


def test_what_vllm_is_told(vllm_path: Path, tmp_path: Path) -> None:
    config = BesideConfig(vllm_path=vllm_path)
    (short,), (long,) = cases_of(config, "block"), cases_of(config, "long")
    assert 16384 + 8 * (512 + OWN) + 64 < longest(short) < longest(long) - 3 * 16384 + 1
    assert {side for part in config.parts for side in sides_of(part)} >= {"vllm small earlier runner", "vllm long"}
    shape = vllm_config("qwen2.5-1.5b")
    assert shape["architectures"] == ["Qwen2ForCausalLM"] and json.dumps(shape)
    with pytest.raises(ConfigError, match="has no vllm"):
        BesideConfig(vllm_path=tmp_path)
    with pytest.raises(ConfigError, match="rounds must be at least 1"):
        BesideConfig(vllm_path=vllm_path, rounds=0)
    with pytest.raises(ConfigError, match="the smaller first, got 5 4"):
        BesideConfig(vllm_path=vllm_path, uneven_context=(5, 4))
    with pytest.raises(ValueError, match="ask for more tokens"):
        step_figures([0.1] * 8)
