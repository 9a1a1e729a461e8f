#!/usr/bin/env bash
# transformers 5.23.0 (PyPI), torch 2.13.0 on the CPU.
#
# Expected: position ids say where a token stands for the rotary embedding, and the attention mask alone says what it
#   sees. A row whose positions jump forward (0 1 2 10 11 12) and that brings no mask is attended causally as a whole.
# Seen: with use_cache=False, as training and gradient checkpointing have it, any step of the positions other than +1,
#   forward ones too, starts a new sequence: the last token no longer sees the first three. With use_cache=True, the
#   default, or with a mask of ones, the same call sees all of them. Nothing warns.
# Output seen (by how much the last logits move when the first token changes):
#   sdpa use_cache=True: moves, use_cache=False: 0.0, use_cache=False with a mask of ones: moves
#   eager use_cache=True: moves, use_cache=False: 0.0, use_cache=False with a mask of ones: moves
# Layouts whose positions jump or go back within one text (parallel branches, trees) are trained as separate texts unless
# a mask is passed, and then generate differently, because generation caches.
#
# Exits with 0 if the gap cuts attention without a cache alone, with another status if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 2> "$work/errors" || { cat "$work/errors"; exit 1; }
"$work/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

torch.manual_seed(0)
config = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3)
ids = torch.randint(0, 64, (1, 6))
changed = ids.clone()
changed[0, 0] = (changed[0, 0] + 1) % 64
positions = torch.tensor([[0, 1, 2, 10, 11, 12]])
ways = {
    "use_cache=True": {"use_cache": True},
    "use_cache=False": {"use_cache": False},
    "use_cache=False with a mask of ones": {"use_cache": False, "attention_mask": torch.ones_like(ids)},
}
as_described = True
for attention in ("sdpa", "eager"):
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=attention).double().eval()
    said = []
    for name, arguments in ways.items():
        with torch.no_grad():
            last = [model(row, position_ids=positions, **arguments).logits[0, -1] for row in (ids, changed)]
        moved = float((last[0] - last[1]).abs().max())
        said.append(f"{name}: {'moves' if moved > 1e-3 else moved}")
        as_described &= (moved == 0) == (name == "use_cache=False")
    print(attention, ", ".join(said))
sys.exit(0 if as_described else 1)
PY
