"""Small Hugging Face folders, as save_pretrained writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_multiverse.checkpoints.formats.hf import HFSource

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip


def save_hf_model(
    folder: Path, model_type: str = "qwen2", *, seed: int = 0, dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB", **changes: Any,
) -> torch.nn.Module:  # fmt: skip
    """Write a random model whose logits depend on every one of its tensors; returns it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**SHAPE, **changes}, eos_token_id=257, bos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.3 if parameter.ndim == 1 else 0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def save_tokenizer(folder: Path, *, tags: tuple[str, ...] = (), extra: int = 0) -> None:
    """Write a byte-level tokenizer: 256 bytes, three special tokens (ids 256 to 258), `extra` words, `tags`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: k for k, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *[f"<|word{k}|>" for k in range(extra)], *tags]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in words])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def mcore_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every megatron-core parameter of a Hugging Face folder, by the names of the local spec."""
    source = HFSource(folder)
    return {entry.mcore: source.read(entry) for entry in source.entries()}
