from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("kernel", ["tiles", "rope", "rope_qkv", "far_heads"])
def test_kernel_equals_its_reference_in_the_interpreter(kernel: str) -> None:
    program = Path(__file__).parent / "interpreted.py"
    result = subprocess.run([sys.executable, str(program), kernel], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
