"""Parallel blocks through plain completions: our own server, told not to fork, stands for any other one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from megatron_multiverse.clients.http import connect, post
from megatron_multiverse.clients.reprefill import Reprefill, ReprefillConfig, answers
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.structure.trajectory import check_text
from tests.forked import run_forked
from tests.unit.server.running import PROMPT, Running

TOOL = Path(__file__).parents[3] / "tools" / "serve_by_reprefill.py"
PLAIN = {"temperature": 0, "multiverse": {"enabled": False}}
NESTED = "Work out A = 583 + 967; B = (48 + 76) - (13 * 4). Think step by step and in parallel before answering."
SEQUENTIAL = "Work out A = 57 + 68; B = 91 - 27. Think step by step before answering."


@pytest.mark.parametrize("prompt", [PROMPT, NESTED, SEQUENTIAL])
def test_paths_are_those_of_the_engine(server: Running, prompt: str) -> None:
    """What a path reads is the same in both ways, so it writes the same; the rest is well-formed, and adds up."""

    async def both() -> tuple[dict[str, object], dict[str, object]]:
        async with connect(server.url) as client:
            asked = {"prompt": prompt, "max_tokens": 900, "temperature": 0, "multiverse": {}}
            native = await post(client, "/v1/completions", asked)
            return native, await Reprefill(client, PLAIN).answer(prompt, 900)

    native, row = asyncio.run(both())
    (choice,) = native["choices"]  # type: ignore[misc]
    text, blocks = str(row["text"]), choice["multiverse"]["blocks"]  # type: ignore[index]
    check_text(text)
    assert text.partition("<Conclusion>")[0] == choice["text"].partition("<Conclusion>")[0]  # type: ignore[index]
    assert row["finish_reason"] == "stop" and text.count("<Parallel>") == len(blocks)
    paths = sum(len(block["branches"]) for block in blocks)
    assert row["requests"] == 1 + paths + len(blocks), "one for each path, and one for what follows each block"
    assert (row["num_parallel"] > 1) == (len(blocks) > 0) and row["critical_tokens"] <= row["tokens"] <= 900  # type: ignore[operator]


def test_the_budget_holds_and_structure_is_closed_where_it_ends(server: Running) -> None:
    async def ask(most: int) -> dict[str, object]:
        async with connect(server.url) as client:
            return await Reprefill(client, PLAIN).answer(PROMPT, most)

    for most in (1, 60, 100, 150):
        row = asyncio.run(ask(most))
        assert row["finish_reason"] == "length" and 0 <= row["tokens"] <= most  # type: ignore[operator]


def test_the_tool_prints_an_answer_and_writes_many(server: Running, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": PROMPT}), json.dumps({"prompt": SEQUENTIAL})]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    command = [TOOL, "--url", server.url, "--extra-body", json.dumps(PLAIN)]
    done = run_forked(*command, "--input", tmp_path / "prompts.jsonl", "--output", tmp_path / "out" / "answers.jsonl")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [json.loads(line)["prompt"] for line in lines]
    assert "<Conclusion>" in rows[0]["text"] and "Answer: A = 125; B = 64" in rows[1]["text"]


def test_what_cannot_be_asked_is_named(tmp_path: Path) -> None:
    for options in (
        {},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "extra_body": "["},
        {"prompt": "a", "extra_body": "3"},
    ):
        with pytest.raises(ConfigError):
            ReprefillConfig(**options)  # type: ignore[arg-type]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n[]\n')

    async def all_rows() -> None:
        async for _ in answers(ReprefillConfig(input=tmp_path / "a.jsonl")):
            raise AssertionError("no row")

    with pytest.raises(ConfigError, match="line 2"):
        asyncio.run(all_rows())
