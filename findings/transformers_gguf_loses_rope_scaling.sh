#!/usr/bin/env bash
# transformers 5.24.0, gguf 0.19.0, torch 2.13.0 on the CPU (one process), PyPI; models with random weights.
#
# Guess before trying: of the keys of a GGUF file those are taken that a table names, and few tables name what scales
#   the rotary embedding.
# Expected: from_pretrained(folder, gguf_file="model.gguf") gives the model that the file holds, as it does for Llama 3
#   and Qwen2.5 without scaling, or says what it leaves out. Files of 32 bits lose nothing by rounding.
# Seen: the weights are all right, the positions are not. Whatever stretches the rotary embedding for long texts stays
#   in the file: the factors of Llama 3.1, 3.2 and 3.3 (tensor rope_freqs.weight), the keys rope.scaling.* of YaRN
#   and of linear scaling (Gemma 3). Starcoder2 loses rope.freq_base as well and gets 10000. Nothing warns. Short texts
#   are hardly touched with Llama 3.1, so a first look shows nothing; on long ones another model answers, fine-tuning
#   learns around the wrong positions, and save_pretrained() writes them down for good.
# Output seen (largest distance of the logits of 64, 512 and 1536 tokens from those of the model written into the file,
# in their standard deviation; share of places with another likeliest token; base and kind as read; warnings):
#   Llama 3, no scaling       0.00  0.00  0.00   0 %  base  500000 default  warnings 0
#   Llama 3.1, its factors    0.20  2.73  4.89  48 %  base  500000 default  warnings 0
#   Qwen2.5, no scaling       0.00  0.00  0.00   0 %  base 1000000 default  warnings 0
#   Qwen2.5, YaRN             1.21  3.97  5.77  71 %  base 1000000 default  warnings 0
#   Starcoder2, base 10000    0.00  0.00  0.00   0 %  base   10000 default  warnings 0
#   Starcoder2, base 1000000  4.27  4.63  5.10  91 %  base   10000 default  warnings 0
#   Gemma 3, no scaling       0.00  0.00  0.00   0 %  base 1000000 default  warnings 0
#   Gemma 3, linear           0.07  0.07  0.07   0 %  base 1000000 default  warnings 0
# Handing over the configuration of the model that the file was made from, config=AutoConfig.from_pretrained(that
# folder), avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/positions.py" <<'PY'
import logging
import re
import sys
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZE = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "initializer_range": 0.2, "max_position_embeddings": 32768, "use_cache": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TEXT = torch.randint(3, 128, (1, 1536), generator=torch.Generator().manual_seed(1))
ARCHITECTURE = {"llama": "llama", "qwen2": "qwen2", "starcoder2": "starcoder2", "gemma3_text": "gemma3"}


class Warnings(logging.Handler):
    """Keeps the warnings that transformers gives."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.seen = []

    def emit(self, record):
        self.seen.append(record.getMessage())


def model(kind, rope, layers, tied):
    torch.manual_seed(0)
    options = {"num_hidden_layers": layers, "tie_word_embeddings": tied, "rope_parameters": rope}
    if kind == "gemma3_text":
        options["sliding_window"] = 512
    config = AutoConfig.for_model(kind, **SIZE, **options)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def rope_of_whole_texts(config):
    """The settings of the rotary embedding in layers that see the whole text."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def keys(writer, config):
    """The keys of a GGUF file that say how the model is built, with those that say how its positions are scaled."""
    rope = rope_of_whole_texts(config)
    writer.add_name("random")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(SIZE["head_dim"])
    writer.add_value_length(SIZE["head_dim"])
    writer.add_rope_dimension_count(SIZE["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{number}" for number in range(config.vocab_size)])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if hasattr(config, "norm_epsilon"):
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def write(original, path):
    """The model as a GGUF file of 32 bits, with the names, orders and offsets of the format for each architecture."""
    config, name = original.config, ARCHITECTURE[original.config.model_type]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, name)
    keys(writer, config)
    for key, tensor in original.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target, values = names.get_name(key, try_suffixes=(".weight", ".bias")), tensor.numpy()
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        projection = re.search(r"attn_([qk])\.", target)
        if name == "llama" and projection:  # what is rotated as a pair lies side by side in the file
            values = values.reshape(heads[projection[1]], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if name == "gemma3" and "norm" in target:  # the one that is added to the weight lies in it
            values = values + 1
        writer.add_tensor(target, np.ascontiguousarray(values))
    if rope_of_whole_texts(config)["rope_type"] == "llama3":
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, SIZE["head_dim"], 2) / SIZE["head_dim"])
        writer.add_tensor("rope_freqs.weight", (plain / original.model.rotary_emb.inv_freq).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(name, kind, rope, layers=2, tied=False):
    """The distances of the logits, the share of other likeliest tokens, the kind read and the number of warnings."""
    original, warnings = model(kind, rope, layers, tied), Warnings()
    logging.getLogger("transformers").addHandler(warnings)
    with TemporaryDirectory() as folder:
        write(original, f"{folder}/model.gguf")
        read = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
        ).eval()
    logging.getLogger("transformers").removeHandler(warnings)
    theirs = read.state_dict()
    assert all(torch.allclose(tensor, theirs[key], atol=1e-6) for key, tensor in original.state_dict().items())
    with torch.no_grad():
        wanted, found = original(TEXT).logits[0], read(TEXT).logits[0]
    apart = (wanted - found).abs().amax(-1) / wanted.std()
    apart = [apart[:length].max().item() for length in (64, 512, 1536)]
    other = (wanted.argmax(-1) != found.argmax(-1)).float().mean().item()
    settings = rope_of_whole_texts(read.config)
    distances = " ".join(f"{number:5.2f}" for number in apart)
    kind_read = f"base {settings['rope_theta']:7.0f} {settings['rope_type']}"
    print(f"{name:24} {distances} {100 * other:3.0f} %  {kind_read}  warnings {len(warnings.seen)}", flush=True)
    return apart, settings["rope_type"], len(warnings.seen)


def default(base):
    return {"rope_type": "default", "rope_theta": base}


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}


def gemma(whole):
    return {"full_attention": whole, "sliding_attention": default(1e4)}


pairs = [
    (measure("Llama 3, no scaling", "llama", default(5e5)), measure("Llama 3.1, its factors", "llama", LLAMA3)),
    (measure("Qwen2.5, no scaling", "qwen2", default(1e6)), measure("Qwen2.5, YaRN", "qwen2", YARN)),
    (
        measure("Starcoder2, base 10000", "starcoder2", default(1e4), tied=True),
        measure("Starcoder2, base 1000000", "starcoder2", default(1e6), tied=True),
    ),
    (
        measure("Gemma 3, no scaling", "gemma3_text", gemma(default(1e6)), layers=6, tied=True),
        measure("Gemma 3, linear", "gemma3_text", gemma(LINEAR), layers=6, tied=True),
    ),
]
as_described = all(
    max(right[0]) < 1e-3 and wrong[0][2] > 0.01 and right[1:] == wrong[1:] == ("default", 0) for right, wrong in pairs
)
as_described &= pairs[0][1][0][0] < 0.5 and min(pair[1][0][2] for pair in pairs[:3]) > 2
sys.exit(0 if as_described else 1)
PY
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$work/venv/bin/python" -W ignore "$work/positions.py" 2> "$work/errors" || { tail -5 "$work/errors"; exit 1; }
