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
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
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


QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("G", "o")]


def save_tokenizer(folder: Path, *, tags: tuple[str, ...] = (), extra: int = 0) -> None:
    """Write a byte-level tokenizer: 256 bytes, three special tokens (ids 256 to 258), `extra` words, `tags`."""
    from tokenizers import AddedToken, pre_tokenizers

    tokenizer = _byte_level([])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *[f"<|word{k}|>" for k in range(extra)], *tags]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in words])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    _write(tokenizer, config, folder)


def save_published_tokenizer(folder: Path, model_type: str) -> None:
    """Write a small tokenizer with the files of a published one: Qwen2.5's, Qwen3's or Llama 3.1's.

    Its class, its table of added tokens, its pre-tokenizer and its template stand as those models have them.
    """
    from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors

    tokenizer = _byte_level(MERGES)
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if model_type == "llama":
        special = ["<|begin_of_text|>", "<|end_of_text|>", *[f"<|reserved_special_token_{k}|>" for k in range(6)]]
        special += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
        plain: list[str] = []
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": "<|eot_id|>",
               "chat_template": LLAMA_TEMPLATE, "model_input_names": ["input_ids", "attention_mask"]}  # fmt: skip
    else:
        tokenizer.normalizer = normalizers.NFC()
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
        plain = ["<tool_call>", "</tool_call>"] + ["<think>", "</think>"] * (model_type == "qwen3")
        own = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
               "pad_token": "<|endoftext|>", "unk_token": None, "add_prefix_space": False, "add_bos_token": False,
               "additional_special_tokens": special[1:], "errors": "replace", "split_special_tokens": False,
               "chat_template": CHAT_TEMPLATE}  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in plain])
    if model_type == "llama":
        first = tokenizer.token_to_id(special[0])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", pair=f"{special[0]} $A $B", special_tokens=[(special[0], first)]
        )
    table = {
        str(token): {"content": word, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                     "special": word in special}
        for word in (*special, *plain) if (token := tokenizer.token_to_id(word)) is not None
    }  # fmt: skip
    config = {"added_tokens_decoder": table, "clean_up_tokenization_spaces": False, "model_max_length": 131072, **own}
    _write(tokenizer, config, folder)


def _byte_level(merges: list[tuple[str, str]]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *["".join(pair) for pair in merges]]
    tokenizer = Tokenizer(models.BPE(vocab={text: k for k, text in enumerate(words)}, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _write(tokenizer: Any, config: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def mcore_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every megatron-core parameter of a Hugging Face folder, by the names of the local spec."""
    source = HFSource(folder)
    return {entry.mcore: source.read(entry) for entry in source.entries()}
