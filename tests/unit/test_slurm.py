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


@pytest.mark.parametrize(
    ("code", "restarts", "ends_with", "requeued"),
    [(0, 0, 0, False), (75, 0, 0, True), (75, 3, 75, False), (1, 0, 1, False)],
)
def test_only_a_run_that_saved_goes_back_into_the_queue(
    tmp_path: Path, code: int, restarts: int, ends_with: int, requeued: bool
) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("trainer", TRAINER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "trainer"), "LOG": str(log),
        "CODE": str(code), "MAX_RESTARTS": "3", "SLURM_RESTART_COUNT": str(restarts), "SLURM_JOB_ID": "70001",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", SCRIPT, "--train_iters", "7"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == ends_with, done.stderr
    lines = log.read_text().splitlines()
    config = "pretrain_scripts/configs/qwen2.5_32b_tp8_pp2.yaml"
    want = f"pretrain_scripts/sft_multiverse.py --config {config} --train_iters 7"
    assert lines[:2] == [f"rank {k} of 2, local {k}, at node1:30001: {want}" for k in (0, 1)]
    assert lines[2:] == (["scontrol requeue 70001"] if requeued else [])
    assert (ROOT / config).is_file()
