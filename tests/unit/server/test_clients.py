"""The tools that talk to servers, against a server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from megatron_multiverse.clients.chat import ChatConfig, converse
from megatron_multiverse.clients.http import ServerError, connect, get, post, stream
from megatron_multiverse.clients.load import LoadConfig, measure
from megatron_multiverse.clients.prompts import read_prompts
from megatron_multiverse.clients.soak import LENGTHS, PROMPTS, Clients, SoakConfig
from megatron_multiverse.errors import ConfigError
from tests.forked import run_forked
from tests.in_process import run_here
from tests.unit.server.running import PROMPT, Running

ROOT = Path(__file__).parents[3]


def test_load_in_both_loops_counts_what_was_served(server: Running) -> None:
    config = LoadConfig(
        url=server.url,
        concurrency=[2],
        rate=[50.0],
        num_requests=3,
        warmup=1,
        prompt="Work out A = 1 + 2.",
        max_tokens=20,
    )

    async def rows() -> list[dict[str, float]]:
        return [row async for row in measure(config)]

    closed, opened = asyncio.run(rows())
    assert closed["concurrency"] == 2 and opened["rate"] == 50
    for row in (closed, opened):
        assert row["answers"] == 3 and row["num_errors"] == 0 and row["tokens_per_second"] > 0
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p95"] <= row["ttft_ms_p99"] <= row["latency_ms_p99"]
    with pytest.raises(ConfigError):
        LoadConfig(rate=[0.0])


def test_forced_blocks_are_the_same_work_whatever_is_asked(server: Running, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in (PROMPT, "xyz", [5, 6, 7, 8])]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    config = LoadConfig(
        url=server.url,
        prompts=tmp_path / "prompts.jsonl",
        concurrency=[1, 3],
        rate=[50.0],
        num_requests=3,
        warmup=0,
        forced_branches=3,
        forced_tokens=9,
    )

    async def rows(config: LoadConfig) -> list[dict[str, Any]]:
        return [row async for row in measure(config)]

    found = asyncio.run(rows(config))
    in_turn = replace(config, concurrency=[1], rate=[], max_concurrent_branches=1)
    for row in [*found, *asyncio.run(rows(in_turn))]:
        assert row["num_errors"] == 0 and row["answers"] == 3 and row["paths_per_answer"] == 3
        assert row["tokens_per_answer"] == found[0]["tokens_per_answer"] > 3 * 9
        assert row["num_parallel"] == found[0]["num_parallel"] > 1.1
    with pytest.raises(ServerError, match="at most"):
        asyncio.run(rows(replace(config, forced_branches=500, warmup=1)))
    with pytest.raises(ConfigError, match="forced_tokens at least 2"):
        replace(config, forced_tokens=1)


def test_load_reports_errors_and_goes_on(server: Running) -> None:
    config = LoadConfig(url=server.url, concurrency=[1], num_requests=2, warmup=0, temperature=-1.0)

    async def rows() -> list[dict[str, object]]:
        return [row async for row in measure(config)]

    (row,) = asyncio.run(rows())
    assert row["answers"] == 0 and row["num_errors"] == 2 and "temperature" in str(row["errors"])


def test_chat_prints_every_branch(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(converse(ChatConfig(url=server.url, prompt=PROMPT, max_tokens=700)))
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "path 1     | A = 1550" in lines and "path 2     | B = 124" in lines
    assert lines[-1] == "root       | Answer: A = 1550; B = 124"
    assert re.fullmatch(r"-- \d+ tokens on the longest chain, num_parallel \d\.\d\d\n", printed.err)


def test_a_measurement_without_answers_is_an_error_and_says_why(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "load.json"
    flags = ["--url", server.url, "--warmup", "0", "--num-requests", "2", "--concurrency", "1", "2", "--output", out]
    done = run_here(monkeypatch, capsys, "tools/bench_server.py", *flags, "--temperature=-1")
    assert done.returncode == 1 and "tokens/s" not in done.stdout
    assert "concurrency 2: 2 errors, such as: temperature: " in done.stderr
    assert "error: 2 of 2 measurements got no answer" in done.stderr
    assert [row["num_errors"] for row in json.loads(out.read_text())] == [2, 2]


def test_addresses_as_people_write_them(server: Running) -> None:
    async def models(url: str) -> Any:
        async with connect(url) as client:
            return await get(client, "/v1/models")

    for url in (server.url, server.url + "/", server.url + "/v1", server.url + "/v1/"):
        assert asyncio.run(models(url))["data"]
    for url in ("127.0.0.1:5000", "localhost", ""):
        with pytest.raises(ConfigError, match="begin it with http://"):
            connect(url)


def test_a_server_that_is_not_there_is_one_line() -> None:
    for tool in ("text_generation_cli.py", "bench_server.py"):
        done = run_forked(ROOT / "tools" / tool, "--url", "http://127.0.0.1:9", "--prompt", "x")
        assert done.returncode == 1 and done.stderr.startswith("error: no server answers at http://127.0.0.1:9")
        assert len(done.stderr.splitlines()) == 1


def test_errors_keep_what_the_server_said(server: Running) -> None:
    async def main() -> None:
        async with connect(server.url) as client:
            with pytest.raises(ServerError, match="temperature") as raised:
                await post(client, "/v1/completions", {"prompt": "a", "temperature": -1})
            assert raised.value.status == 400
            with pytest.raises(ServerError, match="temperature"):
                async for _ in stream(client, "/v1/completions", {"prompt": "a", "temperature": -1}):
                    raise AssertionError("no chunk")

    asyncio.run(main())


def test_chunks_of_other_servers_hold_any_character() -> None:
    """vLLM leaves U+2028 and its like in its events; these may come cut anywhere, and lines end in two characters."""
    texts = ["a\u2028b", "\u0085\u2029é", "\x0b"]
    events = [json.dumps({"choices": [{"text": text}]}, ensure_ascii=False) for text in texts]
    body = "".join(f"data: {event}\r\n\r\n" for event in [*events, "[DONE]"]).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 3):
            yield body[start : start + 3]

    async def main() -> list[str]:
        answer = httpx2.MockTransport(lambda request: httpx2.Response(200, content=pieces()))
        async with httpx2.AsyncClient(transport=answer, base_url="http://other") as client:
            return [chunk["choices"][0]["text"] async for chunk in stream(client, "/v1/completions", {})]

    assert asyncio.run(main()) == texts


def test_prompts_of_a_file_hold_any_character_and_wrong_lines_are_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\u2028b"}\n\n{"prompt": "c\u0085"}', encoding="utf-8")
    assert read_prompts(file) == ["a\u2028b", "c\u0085"]
    for wrong in ("{", "[]", "{}", '{"prompt": 5}', "5"):
        file.write_text('{"prompt": "a"}\n' + wrong, encoding="utf-8")
        with pytest.raises(ConfigError, match="line 2: give a JSON object with a text in its field prompt"):
            read_prompts(file)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="no line in it"):
        read_prompts(file)
    for path, what in ((tmp_path, "a folder"), (tmp_path / "none", "no such file")):
        with pytest.raises(ConfigError, match=what):
            read_prompts(path)
    with pytest.raises(ConfigError, match=r"concurrency must be above 0, got \[1, 0\]"):
        LoadConfig(concurrency=[1, 0])
    with pytest.raises(ConfigError, match="max_tokens must be above 0, got 0"):
        LoadConfig(max_tokens=0)


def test_a_short_soak_holds(server: Running) -> None:
    """Some clients of tools/dev/soak_server.py; what they find wrong is empty."""
    clients = Clients(SoakConfig(seconds=3, rate=15), server.url)

    async def main() -> None:
        await clients.learn()
        while sum(clients.tally.kinds.values()) <= 20:  # a process that stands still meanwhile may see three seconds go
            await clients.come()

    asyncio.run(main())
    tally = clients.tally
    assert tally.wrong == [] and tally.hangs == 0 and tally.compared > 0
    assert len(clients.expected) == len(PROMPTS) * len(LENGTHS)
    server.wait_until_free()


def test_the_soak_notices_what_is_wrong(server: Running) -> None:
    clients = Clients(SoakConfig(), server.url)

    async def main() -> None:
        clients.expected = {(prompt, length): "never said" for prompt in range(len(PROMPTS)) for length in LENGTHS}
        async with connect(server.url) as client:
            await clients._visit(clients._whole, client, asyncio.Semaphore())

    asyncio.run(main())
    (wrong,) = clients.tally.wrong
    assert "never said" in wrong and json.dumps(wrong)
