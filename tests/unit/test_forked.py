"""Programs that are forked end in time, and what they import before their tests look prints nothing."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from megatron_multiverse.parallel import local_ranks
from tests.forked import run_forked
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
TOOLS = sorted(str(file) for folder in ("tools", "pretrain_scripts") for file in (ROOT / folder).glob("*.py"))
SLEEPS = "import time; time.sleep(1000)"
HELP_AND_IMPORTS = """
import importlib, runpy, sys

tools, modules = (words.split(",") for words in sys.argv[1:])
for tool in tools:
    sys.argv = [tool, "--help"]
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, f"{tool}: {ended.code}"
for module in modules:
    importlib.import_module(module)
"""


def test_tools_print_no_warnings_when_they_are_imported() -> None:
    """Tests of programs that are forked do not see those: they are printed where all are forked from."""
    command = [sys.executable, "-c", HELP_AND_IMPORTS, ",".join(TOOLS), ",".join(local_ranks._PRELOAD)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert len(TOOLS) > 15 and done.stdout.count("usage: ") == len(TOOLS)


def test_a_forked_program_prints_and_ends_as_by_itself() -> None:
    done = run_forked("-c", "import sys; print(sys.argv, input()); sys.exit('no')", "a", "b", text="read\n")
    assert (done.returncode, done.stdout, done.stderr) == (1, "['-c', 'a', 'b'] read\n", "no\n")


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired, KeyboardInterrupt])
def test_a_forked_program_ends_with_what_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Also when that is interrupted: multiprocessing would wait for it for ever at the end."""
    started = []
    join = ForkServerProcess.join

    def interrupted(process: ForkServerProcess, timeout: float | None = None) -> None:
        started.append(process)
        if timeout is not None and error is KeyboardInterrupt:
            raise KeyboardInterrupt
        join(process, timeout)

    monkeypatch.setattr(ForkServerProcess, "join", interrupted)
    with pytest.raises(error):
        run_forked("-c", SLEEPS, timeout=0.1)
    assert started[0].exitcode == -9
