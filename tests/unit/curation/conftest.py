"""Chains of real and of random trajectories, and a run of the command on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.curation.config import CurateConfig
from megatron_multiverse.curation.curate import CurateResult, curate_data
from megatron_multiverse.curation.trees import parse_think
from tests.unit.curation.anthropic_server import KEY, AnthropicServer
from tests.unit.curation.random_trees import trajectory
from tests.unit.curation.scripted import Script

MODEL = "claude-sonnet-5-5"


@pytest.fixture(scope="session")
def real_texts(samples_folder: Path) -> dict[str, str]:
    """Real trajectories by file name, in natural order."""
    files = sorted(samples_folder.glob("*.xml"), key=lambda file: int(file.stem))
    return {file.name: file.read_text(encoding="utf-8") for file in files}


@pytest.fixture(scope="session")
def real_scripts(real_texts: dict[str, str]) -> list[Script]:
    return [Script(parse_think(text, sample=name)) for name, text in real_texts.items()]


def random_scripts(count: int) -> list[Script]:
    return [Script(trajectory(seed)) for seed in range(count)]


def write_chains(file: Path, scripts: Sequence[Script]) -> Path:
    """The chains as rows of s1K-1.1."""
    rows = [
        {"question": f"Question {k}?", "deepseek_thinking_trajectory": script.text, "deepseek_attempt": f"It is {k}."}
        for k, script in enumerate(scripts)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Run:
    """Runs the command in a folder against a server."""

    def __init__(self, folder: Path, scripts: Sequence[Script]) -> None:
        self.folder = folder
        self.input = write_chains(folder / "chains.jsonl", scripts)
        self.output = folder / "out"

    def config(self, server: AnthropicServer | None, **options: Any) -> CurateConfig:
        chosen = {"model": MODEL, "min_net_gain": 0.0, "independence": "report", "poll_interval": 0.05, "yes": True}
        chosen["workers"] = 0  # the same code, without the time to fork
        if server is not None:
            chosen["base_url"] = server.url
        return CurateConfig(input=str(self.input), output=self.output, **{**chosen, **options})

    def __call__(self, server: AnthropicServer | None, **options: Any) -> CurateResult:
        result = curate_data(self.config(server, **options), lambda text: False)
        assert isinstance(result, CurateResult)
        return result

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.output / "rows.jsonl")

    @property
    def set_aside(self) -> list[dict[str, Any]]:
        return read_rows(self.output / "set_aside.jsonl")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """The key in the environment; nothing else there decides whom the SDK asks."""
    for name in ("ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_PROFILE", "ANTHROPIC_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    return KEY
