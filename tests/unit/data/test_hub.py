"""The hub of Hugging Face where nobody can reach it, which no test tries: what is said, and that it is said at once."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from megatron_multiverse.data import hub
from megatron_multiverse.data.hub import asking_hub

ROOT = Path(__file__).parents[3]
MODEL = "examples/quickstart/model"


@pytest.fixture
def closed() -> Iterator[str]:
    """An address at which connections are refused."""
    with socket.socket() as held:  # bound, and nobody listens
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> None:
    """No answer of an earlier test, no proxy and no switch of whoever runs the tests."""
    hub._unreachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_PAUSE_S", 0.0)
    monkeypatch.setattr("urllib.request.getproxies", dict)


@pytest.mark.parametrize(
    ("tool", "options", "missing"),
    [
        ("preprocess_data", ["--input", "some-org/rows", "--tokenizer-model", MODEL], "some-org/rows"),
        ("preprocess_data", ["--input", "rows.jsonl", "--tokenizer-model", "some-org/model"], "some-org/model"),
        ("evaluate", ["--tasks", "aime24", "--load", MODEL], "HuggingFaceH4/aime_2024"),
        ("evaluate", ["--tasks", "gpqa_diamond", "--load", MODEL], "Idavidrein/gpqa"),
    ],
)
def test_tools_say_at_once_that_the_hub_cannot_be_reached(tool, options, missing, closed, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    options = [str({"rows.jsonl": tmp_path / "rows.jsonl", MODEL: ROOT / MODEL}.get(word, word)) for word in options]
    options += ["--output-prefix", "out"] if tool == "preprocess_data" else ["--output", "out"]
    unset = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"}
    env = {name: value for name, value in os.environ.items() if name not in unset and "proxy" not in name.lower()}
    env |= {"HF_ENDPOINT": closed, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *options]
    ended = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    *_, warning, error = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert warning == "127.0.0.1 cannot be reached (Connection refused): taking what was fetched before, if it is there"
    assert error.startswith("error: ")
    assert missing in error
    assert "127.0.0.1 cannot be reached (Connection refused)" in error
    assert "Retrying" not in ended.stderr  # what the libraries say before each of many pauses


def test_switches_of_the_libraries_hold_within_alone(closed, monkeypatch):
    import datasets

    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with asking_hub() as why:
        assert "cannot be reached" in why
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_who_answers_is_asked(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with asking_hub() as why:
            assert why == ""
            assert not constants.HF_HUB_OFFLINE


def test_offline_by_choice_is_not_looked_up(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    with asking_hub() as why:
        assert why == "HF_HUB_OFFLINE is set"


def test_slow_networks_and_proxies_are_left_to_the_libraries(closed, monkeypatch):
    def too_slow(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(constants, "ENDPOINT", closed)
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_connect", too_slow)
        with asking_hub() as why:
            assert why == ""
    hub._unreachable.cache_clear()
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"http": "http://proxy.invalid:3128"})
    monkeypatch.setattr("urllib.request.proxy_bypass", lambda _: False)
    with asking_hub() as why:
        assert why == ""


def test_what_is_waited_for_is_said(monkeypatch, caplog):
    said = threading.Event()

    class Notice(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for" in record.getMessage():
                said.set()

    def resolve(*_: object, **__: object) -> list[object]:
        assert said.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(hub, "_SAY_AFTER_S", 0.0)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    hub.logger.addHandler(notice := Notice())
    try:
        with asking_hub() as why:
            assert why == "hub.invalid cannot be reached (Temporary failure in name resolution)"
    finally:
        hub.logger.removeHandler(notice)
    assert "waiting for hub.invalid ... (HF_HUB_OFFLINE=1 takes what was fetched before, without asking)" in caplog.text
