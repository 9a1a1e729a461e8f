#!/usr/bin/env bash
# torch 2.11.0 (cuDNN 9.19) on a Hopper GPU: scaled_dot_product_attention takes cuDNN for causal bfloat16 attention, and
# cuDNN makes a plan for every new sequence length.
#
# Expected: the first call is slow, others of the same heads, width and dtype are quick, whatever the length.
# Seen (H200): the first call of every length from 1000 to 2001 tokens takes 36 to 41 ms, the second 0.11 to 0.16 ms; by
# torch's flash attention the first call of a length takes 0.1 to 0.2 ms. A server whose prompts have all lengths pays
# for a plan with almost every prompt; padding lengths, or choosing flash attention with sdpa_kernel, avoids it.
#
# Needs an sm_90 GPU. Exits 0 if it is still so, 1 if not, 2 without such a GPU. PYTHON=... takes an interpreter that has
# torch instead of installing one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/env"
    PYTHON="$folder/env/bin/python"
    "$PYTHON" -m pip install -q torch==2.11.0 numpy
fi
cat > "$folder/lengths.py" <<'CODE'
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    print("needs a Hopper GPU")
    sys.exit(2)
print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())


def milliseconds(length: int) -> float:
    query = torch.randn(1, 28, length, 128, device="cuda", dtype=torch.bfloat16)
    keys, values = (torch.randn(1, 4, length, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def first_and_second(lengths: list[int]) -> tuple[float, float]:
    milliseconds(900)  # what is loaded and chosen once
    pairs = [(milliseconds(length), milliseconds(length)) for length in lengths]
    print("  first call of a length:", *(f"{first:.2f}" for first, _ in pairs), "ms")
    print("  second call:           ", *(f"{second:.2f}" for _, second in pairs), "ms")
    return statistics.median(x for x, _ in pairs), statistics.median(x for _, x in pairs)


lengths = [1000, 1001, 1017, 1111, 1500, 1733, 1800, 2001]
print("as torch chooses")
chosen = first_and_second(lengths)
print("flash attention")
with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
    flash = first_and_second(lengths)
still = chosen[0] > 20 * chosen[1] and flash[0] < 20 * flash[1]
print("as described" if still else "CHANGED: new lengths cost no plan any more, or flash attention makes one, too")
sys.exit(0 if still else 1)
CODE
"$PYTHON" "$folder/lengths.py"
