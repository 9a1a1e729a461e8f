#!/usr/bin/env bash
# transformers 5.23.0 (PyPI), torch 2.13.0 on the CPU, models with random weights.
#
# Expected: DataCollatorWithFlattening packs documents into one row whose positions start anew with each of them, and the
#   model keeps them apart, as its masks are made from the positions: what a document gets does not depend on its
#   neighbours. So it is with Llama, Qwen3, Gemma 3, Mixtral and others.
# Seen: gpt-oss does not hand the positions to its masks: every document sees all before it, at distances that
#   are wrong besides, since the rotary embedding does start anew. The keyword arguments for flash attention change nothing.
#   eager is what gpt-oss runs by default, and what it can run on most machines. Qwen3.5 masks its full attention and
#   carries the state of its linear attention over; with cu_seq_lens and seq_idx it asks for a package instead.
#   Nothing warns; the loss goes down, because the text before does help to guess the next. (The tracker knows both: pull
#   request 39997, open since August 2025, and issue 46093.)
# Output seen (largest difference of the second document's logits from those it gets alone, for all of about 2):
#   plain:                    Llama 0.00, Qwen3 0.00, Gemma3 0.00, Mixtral 0.00, gpt-oss 2.93, Qwen3.5 2.22
#   with flash attention's:   Llama 0.00, Qwen3 0.00, Gemma3 0.00, Mixtral 0.00, gpt-oss 2.93, Qwen3.5 ValueError
#   gpt-oss with its own mask of documents: 0.00
# Rows of one document each, or a mask of four dimensions, avoid it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/packed.py" <<'PY'
import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    logging,
)
from transformers.models.qwen3_5 import Qwen3_5TextConfig

logging.set_verbosity_error()
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_hidden_layers": 2, "pad_token_id": 0,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
FAMILIES = {
    "Llama": LlamaConfig(**SIZES),
    "Qwen3": Qwen3Config(**SIZES),
    "Gemma3": Gemma3TextConfig(**SIZES),
    "Mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "gpt-oss": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "Qwen3.5": Qwen3_5TextConfig(**SIZES, **LINEAR),
}
FIRST = torch.randint(3, 64, (9,), generator=torch.Generator().manual_seed(9)).tolist()
SECOND = torch.randint(3, 64, (7,), generator=torch.Generator().manual_seed(7)).tolist()


def model_of(config):
    """A model of two layers in the attention that is its default, with weights large enough to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, std=0.08)
    return model


def moved(model, **more):
    """By how much the second document's logits differ when it is packed behind the first one."""
    batch = DataCollatorWithFlattening(return_tensors="pt", **more)([{"input_ids": FIRST}, {"input_ids": SECOND}])
    batch.pop("labels")
    try:
        packed = model(**batch, use_cache=False).logits[:, len(FIRST) :]
    except ValueError as error:
        return type(error).__name__
    return (packed - model(torch.tensor([SECOND]), use_cache=False).logits).abs().max().item()


seen = {"plain": {}, "with flash attention's": {}}
with torch.no_grad():
    for name, config in FAMILIES.items():
        model = model_of(config)
        seen["plain"][name] = moved(model)
        seen["with flash attention's"][name] = moved(model, return_flash_attn_kwargs=True, return_seq_idx=True)
        if name == "gpt-oss":
            attention = model.config._attn_implementation
            documents = torch.tensor([0] * len(FIRST) + [1] * len(SECOND))
            allowed = (documents[:, None] == documents) & torch.ones(16, 16).tril().bool()
            mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
            positions = torch.tensor([[*range(len(FIRST)), *range(len(SECOND))]])
            kept = model(torch.tensor([FIRST + SECOND]), position_ids=positions, attention_mask=mask, use_cache=False)
            alone = model(torch.tensor([SECOND]), use_cache=False).logits
            apart = (kept.logits[:, len(FIRST) :] - alone).abs().max().item()
as_described = attention == "eager" and apart < 1e-4
for kind, families in seen.items():
    shown = (f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in families.items())
    print(f"{kind}: {', '.join(shown)}")
    as_described &= all(families[name] < 1e-4 for name in ("Llama", "Qwen3", "Gemma3", "Mixtral"))
    as_described &= families["gpt-oss"] > 0.5
print(f"gpt-oss with its own mask of documents: {apart:.2f}")
as_described &= seen["plain"]["Qwen3.5"] > 0.5 and seen["with flash attention's"]["Qwen3.5"] == "ValueError"
sys.exit(0 if as_described else 1)
PY
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
"$work/venv/bin/python" -W ignore "$work/packed.py" 2> "$work/errors" || { tail -5 "$work/errors"; exit 1; }
