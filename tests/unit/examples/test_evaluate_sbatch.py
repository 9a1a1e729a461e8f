"""The batch script of an evaluation, with stand-ins for SLURM's command, the servers and tools/evaluate.py."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples/evaluate/evaluate_32b.sbatch"
PYTHON = """#!/bin/bash
case $1 in
  -c) echo the-key ;;
  *server.py)
    echo "server on $CUDA_VISIBLE_DEVICES: $*" >> "$LOG"
    if [[ $SERVER_FAILS ]]; then echo "error: no such checkpoint" >&2; exit 1; fi
    echo "INFO ready: http://127.0.0.1:900${CUDA_VISIBLE_DEVICES::1}" >&2
    exec sleep 600 ;;
  *) for ((k = 0; k < ANSWERS; k++)); do echo '{}' >> "$OUTPUT/samples.jsonl"; done
    echo "evaluate with $MULTIVERSE_API_KEY: $*" >> "$LOG"
    if [[ $CODE ]]; then exit "$CODE"; fi
    exec sleep 600 ;;
esac
"""


def start(folder: Path, **settings: str) -> tuple[subprocess.Popen[str], Path]:
    """The script under way, and the file in which the stand-ins write what they were asked for."""
    for name, text in (("python", PYTHON), ("scontrol", '#!/bin/bash\necho "scontrol $*" >> "$LOG"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "run").mkdir()
    (folder / "log").touch()
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"), "LOG": str(folder / "log"),
        "LOAD": "model", "OUTPUT": str(folder / "run"), "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7",
        "CODE": "", "ANSWERS": "0", "SERVER_FAILS": "", **settings,
    }  # fmt: skip
    command = ["bash", str(SCRIPT), "--budgets", "4096"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True), folder / "log"


@pytest.mark.parametrize("code", ["0", "1"])
def test_four_servers_share_the_answers(tmp_path: Path, code: str) -> None:
    process, log = start(tmp_path, CODE=code)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == int(code), errors
    lines = log.read_text().splitlines()
    assert sorted(line.split(":")[0] for line in lines[:4]) == [f"server on {k},{k + 1}" for k in (0, 2, 4, 6)]
    assert all("--tensor-model-parallel-size 2" in line for line in lines[:4])
    urls = " ".join(f"http://127.0.0.1:900{k}" for k in (0, 2, 4, 6))
    assert len(lines) == 5 and lines[4].startswith(f"evaluate with the-key: tools/evaluate.py --url {urls} --tasks")
    assert lines[4].endswith("--concurrency 64 --budgets 4096")
    assert (tmp_path / "run-servers/key").stat().st_mode & 0o77 == 0


@pytest.mark.parametrize(("answers", "requeued"), [("3", True), ("0", False)])
def test_before_the_time_limit_the_job_goes_back_into_the_queue_if_it_got_somewhere(
    tmp_path: Path, answers: str, requeued: bool
) -> None:
    process, log = start(tmp_path, ANSWERS=answers)
    wait_until(lambda: "evaluate" in log.read_text() or process.poll() is not None, "the answers are written")
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert ("scontrol requeue 7" in log.read_text()) is requeued, errors
    assert process.returncode == (0 if requeued else 1)
    assert requeued or "no answer was finished" in errors


def test_a_server_that_does_not_start_ends_the_job_with_its_error(tmp_path: Path) -> None:
    process, log = start(tmp_path, SERVER_FAILS="1")
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "no such checkpoint" in errors and "evaluate" not in log.read_text()
