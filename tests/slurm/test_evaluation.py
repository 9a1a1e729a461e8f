"""The batch script of an evaluation on a real SLURM of one node, with servers of the quickstart's model on the CPU.
Minutes long: `make test-slurm`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .cluster import missing_programs, running_cluster, wait_for

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples/quickstart"
MISSING = missing_programs()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING} (Debian: slurmctld slurmd slurm-client munge)"),
]


def test_two_servers_share_the_answers_and_a_requeued_job_asks_for_the_others(tmp_path: Path) -> None:
    rows, run, log = tmp_path / "rows.jsonl", tmp_path / "run", tmp_path / "job.log"
    made = ("--output", str(rows), "--num-problems", "12")
    subprocess.run([sys.executable, QUICKSTART / "evaluation_rows.py", *made], check=True)
    settings = {
        "LOAD": str(QUICKSTART / "model"), "OUTPUT": str(run), "TASKS": "arithmetic", "NUM_SEEDS": "4",
        "TENSOR_PARALLEL": "1", "ANSWERS_PER_SERVER": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    script = ROOT / "examples/evaluate/evaluate_32b.sbatch"
    options = ("--parsable", "--gpus-per-node=2", "--cpus-per-task=2", f"--output={log}")
    words = ("--data", f"arithmetic={rows}", "--chat", "false", "--draw.max-tokens", "2000")

    def answers() -> list[dict[str, object]]:
        file = run / "samples.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] \
            if file.exists() else []  # fmt: skip

    (tmp_path / "slurm").mkdir()
    with running_cluster(tmp_path / "slurm") as cluster:
        number = cluster.run("sbatch", *options, script, *words, cwd=ROOT, **settings)
        wait_for("some answers", lambda: len(answers()) >= 6, 300)
        cluster.run("scancel", "--batch", "--signal=USR1", number)  # as SLURM does before the time limit
        wait_for("the next start", lambda: "start 2, 2 servers" in log.read_text(), 300)
        kept = answers()
        wait_for("the end", lambda: cluster.field(number, "JobState") not in ("RUNNING", "PENDING"), 400)
        assert cluster.field(number, "JobState") == "COMPLETED", log.read_text()
    told = log.read_text()
    assert "start 1, 2 servers" in told and "goes back into the queue" in told and "Traceback" not in told
    found = answers()
    assert found[: len(kept)] == kept and 6 <= len(kept) < 48, "none is asked for again"
    assert len({(row["problem"], row["seed"]) for row in found}) == len(found) == 48
    assert json.loads((run / "report.json").read_text())["missing answers"] == 0
