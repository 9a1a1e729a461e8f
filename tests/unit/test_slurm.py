"""The batch script, with stand-ins for SLURM's commands and for the trainer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "pretrain_scripts/slurm/sft_qwen2.5_32b_multiverse.sbatch"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
worst=0
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" || { code=$?; worst=$((code > worst ? code : worst)); }
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'node1\\nnode2\\n'; else echo "scontrol $*" >> "$LOG"; fi
"""
TRAINER = """#!/bin/bash
echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, at $MASTER_ADDR:$MASTER_PORT: $*" >> "$LOG"
exit "$CODE"
"""


def run_script(folder: Path, code: int, job: int = 70001) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """How the script ends where the trainer ends with this code, and what the stand-ins were asked for."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("trainer", TRAINER)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    log = folder / "log"
    log.write_text("")
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "trainer"), "LOG": str(log),
        "CODE": str(code), "SAVE": str(folder / "run"), "MAX_STARTS_PER_STEP": "2", "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", SCRIPT, "--train_iters", "7"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    return done, log.read_text().splitlines()


@pytest.mark.parametrize(
    ("code", "ends_with", "requeued"),
    [(0, 0, False), (75, 0, True), (138, 0, True), (1, 1, False)],
)
def test_only_a_run_that_saved_goes_back_into_the_queue(
    tmp_path: Path, code: int, ends_with: int, requeued: bool
) -> None:
    done, lines = run_script(tmp_path, code)
    assert done.returncode == ends_with, done.stderr
    config = "pretrain_scripts/configs/qwen2.5_32b_tp8_pp2.yaml"
    want = f"pretrain_scripts/sft_multiverse.py --config {config} --checkpoint.save {tmp_path}/run --train_iters 7"
    assert lines[:2] == [f"rank {k} of 2, local {k}, at node1:30001: {want}" for k in (0, 1)]
    assert lines[2:] == (["scontrol requeue 70001"] if requeued else [])
    assert (ROOT / config).is_file()


def test_a_job_that_starts_again_without_a_new_checkpoint_is_ended(tmp_path: Path) -> None:
    pointer = tmp_path / "run/latest_checkpointed_iteration.txt"
    assert [run_script(tmp_path, 75)[0].returncode for _ in range(2)] == [0, 0]
    pointer.write_text("5\n")  # a checkpoint: it may start twice from there, too
    assert [run_script(tmp_path, 75)[0].returncode for _ in range(2)] == [0, 0]
    done, lines = run_script(tmp_path, 75)
    assert (done.returncode, lines) == (1, [])
    assert "started 2 times from step 5 without a new checkpoint" in done.stderr
    assert run_script(tmp_path, 75, job=70002)[0].returncode == 0  # another job, started by a user who has looked
