#!/usr/bin/env bash
# Triton 3.6.0 (PyPI; 3.7.1 brings the same ptxas, 12.8.93) for Hopper: float32 -> FP8 (e4m3) -> float32 gives wrong
# numbers if the FP8 numbers are stored, too.
#
# Expected: every number rounded to FP8, as the interpreter gives it and as the PTX says, which is right.
# Seen on an H200: 255 of 512 numbers are wrong, two of every four; the FP8 numbers themselves are right. ptxas joins
#   two conversions into one word for the store, and the conversion back of the first pair reads another register: here
#   R1, the stack pointer. Other shapes and dtypes read registers that hold other things, or nothing. ptxas 13.0.88
#   compiles the same PTX rightly. Rounding in float32 instead, by adding and subtracting a power of two, avoids it.
#
# No GPU is needed: the machine code is read. PYTHON=... takes an interpreter that has torch and triton instead of
# installing triton; if it finds a Hopper GPU, the kernel runs, too. Exits 0 if it is still so, 1 if not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$work/venv"
    PYTHON="$work/venv/bin/python"
    "$PYTHON" -m pip install --quiet triton==3.6.0
fi
cat > "$work/kernel.py" <<'PY'
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


@triton.jit
def there_and_back(x, small, back, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    rounded = tl.load(x + lane).to(tl.float8e4nv)
    tl.store(back + lane, rounded.to(tl.float32))
    tl.store(small + lane, rounded)


source = triton.compiler.ASTSource(
    fn=there_and_back,
    signature={"x": "*fp32", "small": "*fp8e4nv", "back": "*fp32", "BLOCK": "constexpr"},
    constexprs={"BLOCK": 512},
    attrs={(argument,): [["tt.divisibility", 16]] for argument in range(3)},
)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
print("ptxas:", subprocess.run([tools / "ptxas", "--version"], capture_output=True, text=True).stdout.splitlines()[-1])
cubin = Path(sys.argv[1])
cubin.write_bytes(kernel.asm["cubin"])
text = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
writers, wrong = {}, []
for line in text.splitlines():
    found = re.match(r"\s+/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d+ )?(\S+) ([^;]*);", line)
    if not found:
        continue
    name, operands = found[1], [re.findall(r"\bR(\d+)\b", operand) for operand in found[2].split(",")]
    if "UNPACK_B" in name and not writers.get(operands[1][0], "").startswith(("F2FP", "PRMT")):
        wrong.append(f"{name} {found[2].strip()}, which {writers.get(operands[1][0], 'nothing')} wrote")
    if operands[0] and not name.startswith("ST"):
        width = 4 if name.endswith(".128") else 2 if name.endswith(".64") or ".WIDE" in name else 1
        writers |= {str(int(operands[0][0]) + k): f"{name} {found[2].strip()}" for k in range(width)}
for line in wrong:
    print("unpacks what is no FP8 number:", line)
if importlib.util.find_spec("torch"):
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        x = (torch.randn(512, device="cuda") * 100).clamp(-400, 400)
        small, back = x.to(torch.float8_e4m3fn), torch.empty_like(x)
        want = small.float()
        there_and_back[(1,)](x, small, back, BLOCK=512, num_warps=4)
        print(f"{torch.cuda.get_device_name()}: {int((back != want).sum())} of 512 numbers are wrong")
sys.exit(0 if wrong else 1)
PY
export TRITON_CACHE_DIR=$work/cache
"$PYTHON" "$work/kernel.py" "$work/kernel.cubin"
