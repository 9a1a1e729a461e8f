#!/usr/bin/env bash
# Triton 3.7.1 (PyPI; 3.6.0 does the same), numpy, torch 2.13.0 on the CPU; no GPU is needed.
#
# Expected: two arguments of tl.load that exclude each other, cache_modifier=".cg" and volatile=True, are refused by
#   Triton's front end, as a wrong name of a modifier is; a kernel that the interpreter runs can be compiled.
# Seen: the interpreter runs the kernel with the right result, the compiler writes the PTX, and ptxas, three stages later,
#   refuses it: "Modifier '.volatile' cannot be combined with modifier '.cg'". A test suite on CPUs that trusts
#   TRITON_INTERPRET=1 meets this on the first GPU. Compiling for a GPUTarget with the ptxas that Triton brings works on any
#   machine and shows it.
# Output seen: interpreter: [0.0, 1.0, 2.0, 3.0]
#   volatile alone: compiled
#   .cg alone: compiled
#   both: refused by ptxas: Modifier '.volatile' cannot be combined with modifier '.cg'
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$work/venv/bin/pip" install --quiet --no-deps triton==3.7.1
cat > "$work/kernel.py" <<'PY'
import os
import re
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def copy(x, y, CACHE: tl.constexpr, VOLATILE: tl.constexpr):
    lane = tl.arange(0, 4)
    tl.store(y + lane, tl.load(x + lane, cache_modifier=CACHE, volatile=VOLATILE))


if os.environ.get("TRITON_INTERPRET") == "1":
    x, y = torch.arange(4.0), torch.zeros(4)
    copy[(1,)](x, y, CACHE=".cg", VOLATILE=True)
    print("interpreter:", y.tolist())
    sys.exit(0 if torch.equal(x, y) else 1)

from triton.backends.compiler import GPUTarget

signature = {"x": "*fp32", "y": "*fp32", "CACHE": "constexpr", "VOLATILE": "constexpr"}
seen = []
for name, cache, volatile in (("volatile alone", "", True), (".cg alone", ".cg", False), ("both", ".cg", True)):
    source = triton.compiler.ASTSource(
        fn=copy, signature=signature, constexprs={"CACHE": cache, "VOLATILE": volatile}
    )
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
        seen.append("compiled")
    except Exception as error:
        seen.append("refused by ptxas: " + re.search(r"Modifier '.volatile'[^\n]*", str(error)).group(0))
    print(f"{name}: {seen[-1]}")
sys.exit(0 if [text.split()[0] for text in seen] == ["compiled", "compiled", "refused"] else 1)
PY
export TRITON_CACHE_DIR=$work/cache
TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/kernel.py"
"$work/venv/bin/python" "$work/kernel.py" 2> "$work/errors" | grep -E '^(volatile alone|.cg alone|both):' || { tail -3 "$work/errors"; exit 1; }
