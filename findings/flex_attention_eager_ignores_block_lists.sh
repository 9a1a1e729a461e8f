#!/usr/bin/env bash
# torch 2.13.0 on the CPU (compiling needs a C++ compiler).
#
# Expected: a BlockMask built from lists of key blocks (BlockMask.from_kv_blocks, no mask_mod) means the same in eager
#   flex_attention, the reference to debug with, as in the compiled one: keys whose block is not listed are not seen.
# Seen: eager runs mask_mod alone, on every pair. Without one it attends to all keys, listed or not, and nothing warns.
#   The compiled function follows the lists. A test that compares with eager proves nothing about them.
# Output seen (largest difference from attention inside the two listed blocks, and from full attention):
#   eager:    listed blocks 0.50, all keys 0.00
#   compiled: listed blocks 0.00, all keys 0.50
#
# Exits with 0 if eager ignores the lists and the compiled function follows them, with another status if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/lists.py" <<'PY'
import sys

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
query, key, value = (torch.randn(1, 1, 256, 16) for _ in range(3))
# Two query blocks of 128, each with one key block: its own.
lists = BlockMask.from_kv_blocks(
    torch.tensor([[[1, 1]]], dtype=torch.int32), torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32), BLOCK_SIZE=128
)
block = torch.arange(256) // 128
listed = scaled_dot_product_attention(query, key, value, attn_mask=block[:, None] == block)
everything = scaled_dot_product_attention(query, key, value)


def differences(output):
    return [float((output - wanted).abs().max()) for wanted in (listed, everything)]


eager = differences(flex_attention(query, key, value, block_mask=lists))
compiled = differences(torch.compile(flex_attention)(query, key, value, block_mask=lists))
print("eager:    listed blocks {:.2f}, all keys {:.2f}".format(*eager))
print("compiled: listed blocks {:.2f}, all keys {:.2f}".format(*compiled))
sys.exit(0 if eager[0] > 0.1 and eager[1] < 1e-5 and compiled[0] < 1e-5 and compiled[1] > 0.1 else 1)
PY
"$work/venv/bin/python" -W ignore "$work/lists.py"
