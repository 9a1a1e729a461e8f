"""The whole command: faults, limits, and starting again wherever a run was killed."""

from __future__ import annotations

import errno
import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.curation import report, run_folder
from megatron_multiverse.curation.curate import CurateResult, curate_data
from megatron_multiverse.curation.estimate import Estimate
from megatron_multiverse.curation.inputs import PARALLEL
from megatron_multiverse.curation.live import PREPARED
from megatron_multiverse.curation.providers.protocol import ProviderError
from megatron_multiverse.curation.trees import parse_think, think
from megatron_multiverse.errors import ConfigError, DataError
from tests.unit.curation.anthropic_server import KEY, AnthropicServer, Faults
from tests.unit.curation.conftest import MODEL, Run, random_scripts
from tests.unit.curation.scripted import Script
from tests.waiting import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[3]
SCRIPTS = random_scripts(8)
LIVE_FAULTS = dict.fromkeys(
    (
        "429",
        "429_after",
        "529",
        "500",
        "drop",
        "cut_json",
        "refusal",
        "max_tokens",
        "context_window",
        "wrong_structure",
    ),
    0.05,
)
BATCH_FAULTS = dict.fromkeys(
    ("errored", "invalid", "expired", "canceled", "refusal", "max_tokens", "context_window", "wrong_structure"), 0.06
)


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    if "dry_run" not in request.node.name:  # the picture takes longer than all else in these runs
        monkeypatch.setattr(report, "draw_report", lambda *_: None)
    return Run(tmp_path, SCRIPTS)


def names(run: Run) -> list[int]:
    """The rows of the input that have an outcome, by number."""
    passed = [int(row["question"].removeprefix("Question ").rstrip("?")) + 1 for row in run.rows]
    return sorted(passed + [row["row"] for row in run.set_aside])


def files_of(folder: Path) -> str:
    """All text that a run has left behind."""
    return "".join(file.read_text() for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".png")


@pytest.mark.parametrize("batch", [False, True], ids=["live", "batch"])
def test_all_rows_pass_and_a_finished_run_asks_nothing_more(run: Run, batch: bool) -> None:
    with AnthropicServer(SCRIPTS) as server:
        result = run(server, batch=batch)
        assert result.tally.passed == len(SCRIPTS) and result.stopped is None
        assert [row[PARALLEL] for row in run.rows] == [think(script.parts) for script in SCRIPTS]
        assert {row["curation"]["model"] for row in run.rows} == {"claude-sonnet-5-5"}
        calls, rows = server.calls.total(), (run.output / "rows.jsonl").read_bytes()
        assert run(server, batch=batch).tally == result.tally
        assert server.calls.total() == calls and (run.output / "rows.jsonl").read_bytes() == rows
        assert set(server.delivered.values()) == {1}
    assert KEY not in files_of(run.output)


def test_the_cost_is_what_the_provider_bills(run: Run) -> None:
    with AnthropicServer(SCRIPTS) as server:
        live = run(server).tally
        shutil.rmtree(run.output)
        batch = run(server, batch=True).tally
    assert batch.dollars == pytest.approx(live.dollars / 2, rel=0.05)
    usage = [entry["usage"] for row in run.rows for entry in row["curation"]["history"]]
    output = sum(part["output"] for part in usage)
    prompt = sum(part["input"] for part in usage)
    cache = sum(part["cache_write"] * 2.5 + part["cache_read"] * 0.1 for part in usage)
    assert batch.dollars == pytest.approx((output * 10 + prompt * 2 + cache) / 1e6 / 2)


@pytest.mark.parametrize("batch", [False, True], ids=["live", "batch"])
def test_with_faults_every_sample_ends_and_none_is_paid_twice(run: Run, batch: bool) -> None:
    faults = Faults({} if batch else LIVE_FAULTS, seed=1)
    with AnthropicServer(SCRIPTS, faults=faults, batch_faults=BATCH_FAULTS) as server:
        result = run(server, batch=batch)
        assert len(server.failed) >= 4
        assert set(server.delivered.values()) == {1}
    assert result.tally.open == 0 and names(run) == list(range(1, len(SCRIPTS) + 1))
    assert result.tally.passed > 3
    for row in run.set_aside:
        assert row["code"] and row["reason"] and row["history"]
        assert "problem" in row["history"][-1]
        if row["code"] == "refusal":
            assert row["history"][-1]["stop"] == "refusal" and row["reason"].startswith("reasoning_extraction")


def start(run: Run, server: AnthropicServer, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "tools/curate_data.py", "--input", str(run.input), "--output", str(run.output)]
    command += ["--model", "claude-sonnet-5-5", "--base-url", server.url, "--min-net-gain", "0", "--yes"]
    command += ["--independence", "report", "--concurrency", "4", "--poll-interval", "0.05", "--views", "0"]
    return subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_calls(server: AnthropicServer, process: subprocess.Popen[str], count: int) -> None:
    wait_until(lambda: server.calls.total() >= count or process.poll() is not None, f"{count} calls have been made")


@pytest.mark.parametrize("batch", [False, True], ids=["live", "batch"])
def test_killed_runs_go_on_and_pay_for_no_answer_twice(run: Run, batch: bool) -> None:
    with AnthropicServer(SCRIPTS, latency_s=0.05, batch_s=0.3) as server:
        for number in range(2):
            process = start(run, server, *(["--batch"] if batch else []))
            calls = server.calls.total() + 3 + 2 * number
            wait_for_calls(server, process, calls)
            process.kill()
            process.communicate()
            server.wait_until_clients_have_left()
        result = run(server, batch=batch, concurrency=4)
        assert max((count for _, count in server.busy), default=0) <= 4
        assert result.tally.passed == len(SCRIPTS)
        assert [row[PARALLEL] for row in run.rows] == [think(script.parts) for script in SCRIPTS]
        # Live, what was under way when the run was killed is asked again: at most one answer for each sample.
        twice = sum(count - 1 for count in server.delivered.values())
        assert twice <= (0 if batch else 2 * len(SCRIPTS))


def test_a_batch_whose_id_got_lost_is_found_again(run: Run) -> None:
    with AnthropicServer(SCRIPTS) as server:
        server.lose_next_batch_answer = True
        assert run(server, batch=True).tally.passed == len(SCRIPTS)
        assert server.calls["POST /v1/messages/batches"] == 3
        assert set(server.delivered.values()) == {1}


def test_a_batch_that_was_handed_over_but_not_noted_is_found_by_the_next_start(run: Run) -> None:
    with AnthropicServer(SCRIPTS) as server:
        run(server, batch=True)
        first = min((run.output / "batches").iterdir(), key=lambda file: json.loads(file.read_text())["made"])
        state = json.loads(first.read_text())
        first.write_text(json.dumps(state | {"batch": None, "is_fetched": False}))
        shutil.rmtree(run.output / "samples")
        (run.output / "batches" / "0000.json").write_text(
            json.dumps({"made": time.time(), "requests": {"0000-0": ["x", "y"]}, "batch": None, "is_fetched": False})
        )
        result = run(server, batch=True)
        assert result.tally.passed == len(SCRIPTS)
        assert server.calls["POST /v1/messages/batches"] == 3 + 2, "the first stage is not asked again"
        assert not (run.output / "batches" / "0000.json").exists(), "this one had never arrived"


def test_sigterm_waits_for_the_answers_that_are_paid(run: Run) -> None:
    with AnthropicServer(SCRIPTS) as server:
        with server.held():
            process = start(run, server)
            wait_for_calls(server, process, 1)
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            assert any("waiting for the answers that are under way" in line for line in process.stderr)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1 and "stopped by SIGTERM; the same command goes on" in errors
        delivered = Counter(server.delivered)
        run(server)
        assert all(server.delivered[digest] == 1 for digest in delivered)


@pytest.mark.parametrize("batch", [False, True], ids=["live", "batch"])
def test_the_cost_limit_holds(run: Run, batch: bool) -> None:
    limit = 0.4 if batch else 0.8
    with AnthropicServer(SCRIPTS) as server:
        result = run(server, batch=batch, max_cost_usd=limit, concurrency=3)
        assert result.stopped is not None and "--max-cost-usd" in result.stopped
        spent = _spent(run)
        assert 0 < spent <= limit and result.tally.open > 0
        assert limit - spent < 0.45, "no more room than one request could take"
        assert run(server, batch=batch, max_cost_usd=limit, concurrency=3).stopped and _spent(run) <= limit
        assert run(server, batch=batch, max_cost_usd=100.0).tally.passed == len(SCRIPTS)
        assert set(server.delivered.values()) == {1}


def _spent(run: Run) -> float:
    kept = (json.loads(file.read_text()) for file in (run.output / "samples").glob("*/[0-9]*.json"))
    total = 0.0
    for answer in (entry["answer"] for entry in kept):
        used = answer["usage"]
        price = used["input"] * 2 + used["cache_write"] * 2.5 + used["cache_read"] * 0.1 + used["output"] * 10
        total += price / 1e6 * (0.5 if answer["is_batch"] else 1)
    return total


def test_one_run_at_a_time_and_with_the_same_settings(run: Run) -> None:
    with AnthropicServer(SCRIPTS) as server:
        with server.held():
            process = start(run, server)
            wait_for_calls(server, process, 1)
            with pytest.raises(DataError, match="another run works in"):
                run(server)
            process.kill()
            process.communicate()
        run(server, limit=1)  # a folder without an answer takes other settings
        with pytest.raises(ConfigError, match="effort was 'medium' and is 'high' now"):
            run(server, effort="high")
    (run.folder / "other").mkdir()
    (run.folder / "other" / "file").touch()
    run.output = run.folder / "other"
    with pytest.raises(ConfigError, match="holds something else"):
        run(None, dry_run=True)


def test_a_provider_that_takes_nothing_ends_the_run_and_keeps_what_was_paid(run: Run) -> None:
    with AnthropicServer(SCRIPTS) as server:
        server.status = 401
        with pytest.raises(ProviderError, match="check ANTHROPIC_API_KEY"):
            run(server, concurrency=3)
        assert server.calls.total() <= 3 + PREPARED, "only what was under way or ready to be sent"
        server.status = None
        assert run(server).tally.passed == len(SCRIPTS)


def test_a_full_disk_ends_the_run_and_loses_only_what_could_not_be_written(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = run_folder.write_json_atomic, []

    def write(path: Path, value: Any, **options: Any) -> None:
        written.append(path)
        if len(written) == 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, value, **options)

    with AnthropicServer(SCRIPTS, latency_s=0.01) as server:
        monkeypatch.setattr(run_folder, "write_json_atomic", write)
        with pytest.raises(OSError, match="No space left"):
            run(server, concurrency=4)
        assert server.calls.total() < 3 * len(SCRIPTS), "no request is sent after it"
        assert run(server).tally.passed == len(SCRIPTS)
        assert sum(count - 1 for count in server.delivered.values()) <= 1


def test_what_the_provider_refused_for_good_is_taken_up_again_by_the_next_start(run: Run) -> None:
    with AnthropicServer(SCRIPTS[:-1]) as server:  # it answers 400 to a chain that it does not know
        result = run(server)
        assert result.tally.set_aside == {"provider": 1} and "no script" in run.set_aside[0]["reason"]
        server.messages.scripts[SCRIPTS[-1].chain.numbered()] = SCRIPTS[-1]
        assert run(server).tally.passed == len(SCRIPTS)


def test_samples_set_aside_are_taken_up_again_when_asked_for(run: Run) -> None:
    with AnthropicServer(SCRIPTS, faults=Faults({"refusal": 0.3}, seed=2)) as server:
        first = run(server).tally
        assert first.set_aside["refusal"] > 0
        server.faults = Faults()
        assert run(server).tally.passed == first.passed
        # The refusals are kept like any answer, so taking samples up again costs nothing and ends the same.
        calls = server.calls.total()
        assert run(server, retry_set_aside=True).tally.set_aside == first.set_aside
        assert server.calls.total() == calls


def test_rows_that_cannot_be_used_are_set_aside_with_the_reason(run: Run) -> None:
    with open(run.input, "a") as stream:
        stream.write('not json\n{"question": "q", "deepseek_thinking_trajectory": 5, "deepseek_attempt": "a"}\n')
        stream.write('{"question": "q", "deepseek_thinking_trajectory": "a <Path>", "deepseek_attempt": "a"}\n')
    with AnthropicServer(SCRIPTS) as server:
        result = run(server)
    assert result.tally.passed == len(SCRIPTS) and result.tally.set_aside == {"input": 3}
    assert [row["row"] for row in run.set_aside] == [len(SCRIPTS) + k for k in (1, 2, 3)]


def test_a_dry_run_asks_nobody_and_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    text = "\n".join(f"Case {k}: suppose that n = {k}. " + "We count again and again. " * 30 for k in range(4))
    (run.folder / "chains.jsonl").write_text(json.dumps({"prompt": "Q", "response": f"Begin.\n{text}\nThat is all."}))
    result = run(None, dry_run=True, model="")
    assert result.tally.passed == 1 and result.tally.kinds == {"case_study": 1}
    (row,) = run.rows
    assert "not for training" in row["curation"]["model"] and row["prompt"] == "Q"
    assert parse_think(row["response"])
    assert "Not for training" in (run.output / "report.md").read_text()
    assert (run.output / "report.png").stat().st_size > 10_000
    (page,) = (run.output / "views").iterdir()
    assert "</script" not in page.read_text().partition("const data = ")[2].partition("\n")[0]


def test_the_estimate_is_near_what_a_run_costs(tmp_path: Path, real_scripts: list[Script]) -> None:
    run = Run(tmp_path, real_scripts)
    with AnthropicServer(real_scripts) as server:
        estimate = curate_data(run.config(server, estimate=True), lambda text: False)
        assert isinstance(estimate, Estimate) and not server.bodies
        dollars = run(server).tally.dollars
    assert 1 / 1.5 < estimate.dollars(is_batch=False, is_cached=True) / dollars < 1.5
    text = estimate.text(is_batch=True, is_cached=True)
    assert "counted by the provider" in text and "batch, with prompt cache" in text


def test_nothing_is_asked_without_confirmation(run: Run) -> None:
    shown: list[str] = []
    with AnthropicServer(SCRIPTS) as server:
        with pytest.raises(ConfigError, match="not confirmed"):
            curate_data(run.config(server, yes=False), lambda text: bool(shown.append(text)))
        assert not server.bodies and "about $" in shown[0]
        # Nothing has been asked for yet, so the folder is free for other settings.
        assert run(server, effort="low").tally.passed == len(SCRIPTS)
        with pytest.raises(ConfigError, match="other settings"):
            run(server, effort="high")
        (run.output / "run.json").write_text(json.dumps({"draw": 1}))  # another tool's
        shutil.rmtree(run.output / "samples")
        (run.output / "samples.jsonl").write_text("")
        with pytest.raises(ConfigError, match="other settings"):
            run(server, effort="low")


def test_samples_without_an_answer_end_the_command_with_the_reason(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with AnthropicServer(SCRIPTS[:-1]) as server:
        assert run(server, limit=7).unanswered == ""
        words = ["curate_data.py", "--input", run.input, "--output", run.output, "--model", MODEL, "--yes"]
        words += ["--independence", "report", "--min-net-gain", 0, "--workers", 0, "--base-url", server.url]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit, match=r"1 samples got no answer, the first because .*400"):
            runpy.run_path(str(ROOT / "tools" / "curate_data.py"), run_name="__main__")


def test_a_cost_that_is_not_known_is_not_shown_as_nothing(run: Run) -> None:
    shown: list[str] = []
    with AnthropicServer(SCRIPTS) as server:
        result = curate_data(
            run.config(server, model="unknown-1", yes=False), lambda text: bool(shown.append(text)) or True
        )
    assert "0.00" not in shown[0] and "--prices adds them" in shown[0]
    assert isinstance(result, CurateResult) and "cost        not counted" in "\n".join(result.tally.lines())
    assert "$0.00" not in (run.output / "report.md").read_text()
    assert json.loads((run.output / "report.json").read_text())["dollars"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "--model is missing"),
        ({"batch": True, "provider": "openai"}, "--batch needs --provider anthropic"),
        ({"model": "unknown-1", "max_cost_usd": 1.0}, "needs the prices of unknown-1"),
        ({"max_distance": 2.0}, "must be a share"),
        ({"concurrency": 0}, "must be at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(None, **options)


def test_the_dry_run_of_the_document_runs_as_written(run: Run) -> None:
    text = (ROOT / "docs" / "curation.md").read_text()
    (line,) = [line for line in text.splitlines() if line.endswith("--dry-run")]
    words = line.replace("runs/dry", str(run.output)).split()
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "2 passed" in done.stdout and "2 kept" in done.stdout
    assert {kind for row in run.rows for kind in [block["kind"] for block in row["curation"]["blocks"]]} == {
        "case_study",
        "path_exploration",
    }


def test_the_tool_ends_in_one_line(run: Run) -> None:
    command = [sys.executable, "tools/curate_data.py", "--input", str(run.input), "--output", str(run.output)]
    environment = {"PATH": "/usr/bin", "HOME": str(run.folder)}
    done = subprocess.run([*command, "--model", "m"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "set ANTHROPIC_API_KEY" in done.stderr and "Traceback" not in done.stderr
