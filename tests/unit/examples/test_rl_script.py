"""examples/rl/run.sh: which seed trains on which GPU, and what a run that fails does to the others."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.waiting import PATIENCE_S

SCRIPT = Path(__file__).parents[3] / "examples" / "rl" / "run.sh"
PYTHON = """#!/bin/bash
# Stands in for python: two GPUs are visible, each call is noted. If seed 2 fails, seed 1 runs until it is stopped.
if [ "$1" = -c ]; then echo 2; exit; fi
trap 'echo "stopped $*" >> "$CALLS"; exit 75' TERM
echo "${CUDA_VISIBLE_DEVICES-} $*" >> "$CALLS"
if [[ "$FAILS" = 2 && "$*" == *"--seed 1 "* ]]; then for _ in $(seq 4000); do sleep 0.05; done; fi
if [[ "$FAILS" = 2 && "$*" == *"--seed 2 "* ]]; then
  until grep -q -e "--seed 1 " "$CALLS"; do sleep 0.05; done
  exit 9
fi
exit 0
"""


def run_script(folder: Path, fails: int = 0) -> tuple[int, list[str]]:
    """Exit code, and the calls of python in their order."""
    python, calls = folder / "python", folder / "calls"
    python.write_text(PYTHON, encoding="utf-8")
    python.chmod(0o755)
    given = {
        "PYTHON": str(python),
        "CALLS": str(calls),
        "SEEDS": "3",
        "CUDA_VISIBLE_DEVICES": "5,7",
        "FAILS": str(fails),
    }
    done = subprocess.run(["bash", SCRIPT, "--train_iters", "9"], env=os.environ | given, timeout=PATIENCE_S)
    return done.returncode, calls.read_text(encoding="utf-8").splitlines()


def test_each_seed_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    code, calls = run_script(tmp_path)
    assert code == 0
    trained = [call.split() for call in calls if "rl_multiverse.py" in call]
    places = {call[call.index("--seed") + 1]: call[0] for call in trained}
    assert places == {"1": "5", "2": "7", "3": "5"} and all(call[-2:] == ["--train_iters", "9"] for call in trained)
    (compared,) = (call for call in calls if "compare.py" in call)
    assert "--models runs/rl/sft/model runs/rl/seed_1/model runs/rl/seed_2/model runs/rl/seed_3/model" in compared


def test_a_run_that_fails_stops_the_others(tmp_path: Path) -> None:
    code, calls = run_script(tmp_path, fails=2)
    assert code not in (0, 124) and not any("compare.py" in call for call in calls)
    assert any(call.startswith("stopped") and "--seed 1" in call for call in calls)
