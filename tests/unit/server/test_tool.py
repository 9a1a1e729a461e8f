"""The tool in processes of its own: docs/serving.md as written, signals, a killed engine."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.forked import run_forked
from tests.unit.server.running import MODEL, PROMPT
from tests.waiting import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "run_text_generation_server.py"
DOCS = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LONG = {"prompt": PROMPT, "max_tokens": 3000, "ignore_eos": True, "temperature": 0}


class Tool:
    """The running tool."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        """Ends with all processes that write to the log."""
        self.reader.start()
        port = self.wait_for(r"listening at http://127\.0\.0\.1:(\d+)")
        self.url = f"http://127.0.0.1:{port}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(iter(self.process.stderr.readline, ""))

    def wait_for(self, pattern: str) -> str:
        """Until the log says it; the group of the pattern, if it has one, else all of it."""

        def found() -> re.Match[str] | None:
            return next((match for line in list(self.log) if (match := re.search(pattern, line))), None)

        wait_until(lambda: found() or self.process.poll() is not None, f"the log says {pattern!r}")
        match = found()
        assert match is not None, "".join(self.log)
        return match[1] if match.groups() else match[0]

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=PATIENCE_S)

    def post(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=PATIENCE_S)

    def wait_for_answers(self, count: int) -> None:
        """Until so many are in the making."""
        wanted = f"multiverse_queue {count:.1f}"
        wait_until(lambda: wanted in self.get("/metrics").text, f"the server says {wanted}")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()


@contextlib.contextmanager
def started(*options: str) -> Iterator[Tool]:
    command = [sys.executable, str(TOOL), "--load", str(MODEL), "--port", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            tool = Tool(process)
            tool.wait_for("ready: ")
            yield tool
        finally:
            for child in psutil.Process(process.pid).children() if process.poll() is None else []:
                child.kill()
            process.kill()


@contextlib.contextmanager
def standing_still(process: psutil.Process) -> Iterator[None]:
    """In the block the process does nothing: what others ask of it lasts until then, however slow the test is."""
    process.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


@pytest.fixture(scope="module")
def tool() -> Iterator[Tool]:
    with started() as running:
        yield running


def run_as_written(command: str, tool: Tool) -> str:
    command = command.replace("http://127.0.0.1:5000", tool.url)
    if command.startswith("python "):
        done = run_forked(*shlex.split(command)[1:], cwd=ROOT)
    else:
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_of_the_docs_run_as_written(tool: Tool) -> None:
    commands = [text for kind, text in FENCE.findall(DOCS) if not kind and text.startswith("curl")]
    outputs = [run_as_written(command, tool) for command in commands]
    assert len(outputs) >= 3 and all('"error"' not in output for output in outputs)
    assert "Answer: A = 1550; B = 124" in outputs[0] and '"num_parallel"' in outputs[0]
    assert '"segments"' in outputs[1]
    assert outputs[2].endswith("data: [DONE]\n\n") and '"event":"open"' in outputs[2]


def test_the_tools_of_the_docs_run_as_written(tool: Tool) -> None:
    (block,) = [text for kind, text in FENCE.findall(DOCS) if "text_generation_cli.py" in text]
    chat, bench = block.replace(".venv/bin/python", "python").strip().splitlines()
    assert "root       | Answer: A = 37; B = 75" in run_as_written(chat, tool)
    assert "0 errors" in run_as_written(bench, tool).splitlines()[-1]
    (block,) = [text for kind, text in FENCE.findall(DOCS) if "serve_by_reprefill.py" in text]
    printed = run_as_written(block.replace(".venv/bin/python", "python"), tool)
    assert printed.splitlines()[-1] == "Answer: A = 37; B = 75"


def test_the_python_of_the_docs_runs_as_written(tool: Tool) -> None:
    (script,) = [text for kind, text in FENCE.findall(DOCS) if kind == "python"]
    script = script.replace("http://127.0.0.1:5000", tool.url)
    done = run_forked("-c", script)
    assert done.returncode == 0 and "Answer: A = 1550; B = 124" in done.stdout, done.stderr


def test_the_start_of_the_docs_is_what_this_starts() -> None:
    (block,) = [text for kind, text in FENCE.findall(DOCS) if "run_text_generation_server.py --load" in text]
    *_, command = block.strip().splitlines()
    assert command == (
        ".venv/bin/python tools/run_text_generation_server.py --load examples/quickstart/model --port 5000"
    )


def test_an_idle_connection_outlives_the_pools_of_clients(tool: Tool) -> None:
    """They keep one for 5 s: a server that closes it at that very time loses the requests that come then."""
    with contextlib.closing(http.client.HTTPConnection(tool.url.removeprefix("http://"), timeout=PATIENCE_S)) as client:
        client.connect()
        first = client.sock
        for idle_s in (1, 6):
            client.request("GET", "/health/live")
            assert client.getresponse().read() == b'{"status":"live"}'
            assert select.select([client.sock], [], [], idle_s)[0] == [], "it is not closed"
        assert client.sock is first


def test_the_engine_goes_on_while_http_stands_still(tool: Tool) -> None:
    """The HTTP process is stopped in the middle of an answer: no step waits for it, and later all of it is there."""
    (engine,) = tool.children()

    def used() -> float:
        times = engine.cpu_times()
        return float(times.user + times.system)

    lines: list[str] = []

    def ask() -> None:
        body = {"prompt": PROMPT, "max_tokens": 800, "ignore_eos": True, "temperature": 0, "stream": True}
        with httpx2.stream("POST", tool.url + "/v1/completions", json=body, timeout=PATIENCE_S) as response:
            lines.extend(response.iter_lines())

    thread = threading.Thread(target=ask)
    with contextlib.ExitStack() as http_stands:
        with standing_still(engine):
            thread.start()
            tool.wait_for_answers(1)
            http_stands.enter_context(standing_still(psutil.Process(tool.process.pid)))
            before = used()
        states: deque[str] = deque(maxlen=20)  # a process that only waits for a core does not sleep

        def is_done() -> bool:
            states.append(engine.status())
            return states.count(psutil.STATUS_SLEEPING) == states.maxlen and used() - before > 0.1

        wait_until(is_done, "the engine has nothing left to do")
        now = used()
    thread.join()
    text = "".join(lines)
    assert text.endswith("data: [DONE]") and '"finish_reason":"length"' in text
    assert used() - now < (now - before) / 2, "it was written meanwhile, not afterwards"


def test_sigterm_lets_answers_finish_and_says_no_to_new_ones() -> None:
    found: dict[str, Any] = {}
    body = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0}
    with started("--limits.drain-timeout", str(PATIENCE_S)) as tool:
        thread = threading.Thread(target=lambda: found.update(answer=tool.post("/v1/completions", body)))
        (engine,) = tool.children()
        with standing_still(engine):
            thread.start()
            tool.wait_for_answers(1)
            tool.process.send_signal(signal.SIGTERM)
            tool.wait_for("draining: 1 answers")
            assert tool.get("/health/live").status_code == 200
            ready, refused = tool.get("/health/ready"), tool.post("/v1/completions", body)
            assert ready.status_code == refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        thread.join()
        assert found["answer"].status_code == 200 and "Answer: A = 1550" in found["answer"].text
        assert tool.process.wait(PATIENCE_S) == 0
        tool.reader.join()
        faults = ("Traceback", "ERROR", "WARNING")  # the engine ends by itself, or a warning says that it was killed
        assert not [line for line in tool.log if any(fault in line for fault in faults)], "".join(tool.log)


def test_a_killed_server_of_one_rank_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with started() as tool:
        engine = tool.children()
        tool.process.kill()
        psutil.wait_procs(engine, timeout=PATIENCE_S)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_engine_fails_those_that_wait_and_a_signal_ends_the_rest(ranks: int) -> None:
    """With two tensor parallel ranks the other one is killed, not the one that talks to HTTP. Before, all of
    them give their memory back, take it again, and read weights."""
    with started("--tensor-model-parallel-size", str(ranks), "--weights-root", str(MODEL.parent)) as tool:
        *others, killed = tool.children()
        assert len(others) == ranks - 1
        listening = [
            connection.laddr.ip
            for process in (psutil.Process(tool.process.pid), *tool.children())
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening and set(listening) <= {"127.0.0.1", "::1"}, "no port for other machines"
        for path, fields in (
            ("release_memory_occupation", {}),
            ("resume_memory_occupation", {}),
            ("update_weights_from_disk", {"model_path": "model"}),
        ):
            response = tool.post(f"/{path}", fields)
            assert response.status_code == 200, response.text
        body = {"prompt": PROMPT, "max_tokens": 700, "temperature": 0}
        text = tool.post("/v1/completions", body).json()["choices"][0]["text"]
        assert text.endswith("Answer: A = 1550; B = 124")
        found: dict[str, Any] = {}
        thread = threading.Thread(target=lambda: found.update(answer=tool.post("/v1/completions", LONG)))
        with standing_still(killed):
            thread.start()
            tool.wait_for_answers(1)
            killed.kill()
            thread.join()
        assert found["answer"].status_code == 503
        assert tool.children() == [], "no rank is left behind"
        assert tool.get("/health/ready").status_code == 503
        tool.wait_for("the engine has ended")
        tool.process.send_signal(signal.SIGINT)
        assert tool.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load", "/no/such/folder"], "no such folder"),
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--limits.max-n", "0"], "limits.max_n must be above 0"),
        (["--tensor-model-parallel-size", "0"], "tensor_model_parallel_size must be at least 1"),
        (["--engine.page-size", "0"], "page_size must be at least 1"),
    ],
)
def test_what_cannot_work_is_one_line(options: list[str], message: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MULTIVERSE_API_KEY"}
    done = run_forked(TOOL, "--load", MODEL, "--port", "0", *options, env=environment)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_an_engine_that_cannot_start_ends_the_server_with_its_reason(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    done = run_forked(TOOL, "--load", tmp_path, "--port", "0")
    assert done.returncode == 1 and str(tmp_path) in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr


def test_the_slurm_script_and_its_client(tmp_path: Path) -> None:
    """Without SLURM the script serves here; the client waits for it and asks with the key."""
    environment = os.environ | {"PYTHON": sys.executable, "RUN_FOLDER": str(tmp_path), "HOST": "127.0.0.1"}
    environment |= {"OMP_NUM_THREADS": "1"}
    script, client = ROOT / "examples" / "serve" / "serve.sbatch", ROOT / "examples" / "serve" / "client.py"
    command = ["bash", str(script), "--served-model-name", "of the script's words"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: (tmp_path / "url").exists() or process.poll() is not None, "the script has the address")
            done = subprocess.run(
                [sys.executable, str(client), str(tmp_path)], capture_output=True, text=True, timeout=PATIENCE_S
            )
            assert "Answer: A = 1550; B = 124" in done.stdout, done.stderr
            assert (tmp_path / "key").stat().st_mode & 0o077 == 0
            models = (tmp_path / "url").read_text().strip() + "/v1/models"
            assert httpx2.get(models, timeout=PATIENCE_S).status_code == 401
            key = {"Authorization": f"Bearer {(tmp_path / 'key').read_text().strip()}"}
            served = httpx2.get(models, headers=key, timeout=PATIENCE_S).json()["data"][0]["id"]
            assert served == "of the script's words"
        finally:
            process.terminate()
        assert process.wait(PATIENCE_S) == 0
