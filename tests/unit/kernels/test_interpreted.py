from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("file", ["interpreted.py", "interpreted_decode.py", "interpreted_scan.py"])
def test_kernels_equal_their_references_in_the_interpreter(file: str) -> None:
    program = Path(__file__).parent / file
    result = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split(), "no kernel was checked"
