"""Programs run as `python` runs them, in processes of their own that are forked from one which has imported torch and
megatron-core: a new interpreter would spend seconds on that, most of what a short program takes.

What a program could see of it: modules that are imported already, and settings that libraries read from the environment
when they are imported. These are of the environment and the folder in which the first test began (`conftest.py`), and
warnings that are printed at an import are none of the program's (`tests/unit/test_forked.py` looks for them). All
programs have one hash seed, and those that use a fork server themselves fork from this one, with what it has imported.
A test of what is imported, or of such a setting, starts an interpreter instead.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from megatron_multiverse.parallel import local_ranks
from tests.waiting import PATIENCE_S

# What else tools and servers import, for the process that all are forked from.
local_ranks._PRELOAD += [
    "megatron_multiverse.inference.build",
    "megatron_multiverse.rl.trainer",
    "megatron_multiverse.server.start",
    "matplotlib.pyplot",
    "transformers",
]


def start_fork_server() -> None:
    """Start the process that all are forked from, with the environment and the folder of now, unless it runs."""
    local_ranks.forking_context()  # which tells it what to import
    forkserver.ensure_running()


def run_forked(
    *words: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    text: str = "",
    timeout: float = PATIENCE_S,
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run([sys.executable, *words], input=text, capture_output=True, text=True)` returns.

    Args:
        words: a script, ``-m`` and a module, or ``-c`` and code; then its arguments.
        cwd: where it runs; here by default.
        env: all of its environment; this process's by default.
        text: what it reads from its standard input.
        timeout: seconds after which it is killed.

    Raises:
        subprocess.TimeoutExpired: it was not done by then.
    """
    command = [str(word) for word in words]
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        files = [Path(folder) / name for name in ("in", "out", "err")]
        for file, content in zip(files, (text, "", ""), strict=True):
            file.write_text(content)
        process = start_forked(command, files, cwd=cwd, env=env)
        try:
            process.join(timeout)
        finally:  # also where this process is interrupted: it would wait at its end for what it started
            code = process.exitcode
            if code is None:
                process.kill()
                process.join()
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout, *(file.read_bytes() for file in files[1:]))
        output, errors = (file.read_text() for file in files[1:])
    return subprocess.CompletedProcess(command, code, output, errors)


def start_forked(
    command: Sequence[str], files: Sequence[Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """Start a program whose standard input, output and errors are these files."""
    given = (command, files, cwd or Path.cwd(), dict(os.environ if env is None else env))
    process = local_ranks.forking_context().Process(target=_run, args=given)
    process.start()
    return process


def _run(command: Sequence[str], files: Sequence[Path], cwd: Path, env: Mapping[str, str]) -> None:
    for number, (file, flags) in enumerate(zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)):
        opened = os.open(file, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing has put another one there
    multiprocessing.set_start_method(None, force=True)  # not the one of this process, but what an interpreter has
    tempfile.tempdir = None  # TMPDIR may be another one
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    kind, *rest = command
    script = kind not in ("-m", "-c")
    sys.argv = list(command) if script else [kind, *rest[1:]]
    folder = str(Path(kind).resolve().parent) if script else os.getcwd()
    # The folders of the interpreter, and of the program: not those where pytest finds the tests.
    given = env.get("PYTHONPATH", "").split(os.pathsep) if "PYTHONPATH" in env else []
    sys.path[:] = [folder, *given, *(name for name in sys.path if name.startswith((sys.prefix, sys.base_prefix)))]
    try:
        if script:
            runpy.run_path(kind, run_name="__main__")
        elif kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends processes without
