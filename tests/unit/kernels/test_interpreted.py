from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


CASES = [("interpreted.py", kernel) for kernel in ("tiles", "rope", "rope_qkv", "far_heads")]
CASES += [("interpreted_decode.py", kernel) for kernel in ("skinny", "rows", "greedy", "write", "decode")]


@pytest.mark.parametrize(("file", "kernel"), CASES)
def test_kernel_equals_its_reference_in_the_interpreter(file: str, kernel: str) -> None:
    program = Path(__file__).parent / file
    result = subprocess.run([sys.executable, str(program), kernel], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
