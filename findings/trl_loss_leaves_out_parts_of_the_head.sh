#!/usr/bin/env bash
# trl 1.16.0, transformers 5.24.0, torch 2.13.0 on the CPU (one process), PyPI.
#
# Expected: SFTTrainer's loss is the loss of the model's own logits, model(input_ids, labels=labels).loss, for every model
#   that AutoModelForCausalLM builds, or the trainer refuses the model.
# Seen: the trainer multiplies the last hidden states by the weight of the output embeddings itself, and knows what else
#   a head does by a few names in the config (final_logit_softcapping, logit_scale, logits_scaling, ...). What goes by
#   another name is left out of the loss, in training and evaluation. ModernBertDecoder loses the dense layer and the
#   norm of its head: they keep their weights however long one trains, while the body learns to do without them, and
#   generation still runs through them. RecurrentGemma loses its soft cap, Inkling the division by
#   logits_mup_width_multiplier and the cut of the padded vocabulary. Nothing warns.
# Output seen:
#   Llama              own loss 11.600  eval_loss 11.600  weights that a step leaves: none
#   ModernBertDecoder  own loss 10.406  eval_loss 22.656  weights that a step leaves: lm_head.dense.weight, lm_head.norm.weight
#   RecurrentGemma     own loss 27.403  eval_loss 61.295  weights that a step leaves: none
#   Inkling            own loss  4.528  eval_loss 11.708  weights that a step leaves: none
# Comparing eval_loss with the model's own loss before training shows it; transformers' Trainer has the right one.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.24.0 tokenizers==0.23.3 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/loss.py" <<'PY'
import logging
import sys

import datasets
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    InklingTextConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
)
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

logging.disable(logging.WARNING)
datasets.disable_progress_bars()
words = {"[PAD]": 0, "[EOS]": 1} | {f"w{k}": k for k in range(2, 96)}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(words, "[PAD]")), pad_token="[PAD]", eos_token="[EOS]"
)
size = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
configs = {
    "Llama": LlamaConfig(**size),
    "ModernBertDecoder": ModernBertDecoderConfig(cls_token_id=1, sep_token_id=1, **size),
    "RecurrentGemma": RecurrentGemmaConfig(lru_width=32, attention_window_size=16, **size),
    "Inkling": InklingTextConfig(
        num_key_value_heads=2, head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, d_rel=4,
        rel_extent=16, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        unpadded_vocab_size=90, **size,
    ),
}  # fmt: skip
rows = torch.randint(2, 90, (8, 16), generator=torch.Generator().manual_seed(0))
data = datasets.Dataset.from_dict({"input_ids": rows.tolist()})
as_described = True
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # The logits of random weights are near 0, where a soft cap and a division hardly show.
        model.get_output_embeddings().weight.mul_(40)
        own = model.eval()(input_ids=rows, labels=rows).loss.item()
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    arguments = SFTConfig(
        f"{sys.argv[1]}/out", per_device_train_batch_size=8, per_device_eval_batch_size=8, max_steps=1, learning_rate=1e-2,
        use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    found = trainer.evaluate()["eval_loss"]
    trainer.train()
    left = [key for key, weight in model.named_parameters() if torch.equal(weight, before[key])]
    print(f"{name:18} own loss {own:6.3f}  eval_loss {found:6.3f}  weights that a step leaves: {', '.join(left) or 'none'}")
    as_described &= (abs(own - found) < 1e-3) == (name == "Llama")
    as_described &= left == (["lm_head.dense.weight", "lm_head.norm.weight"] if name == "ModernBertDecoder" else [])
sys.exit(0 if as_described else 1)
PY
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=1
"$work/venv/bin/python" -W ignore "$work/loss.py" "$work" 2> "$work/errors" || { tail -5 "$work/errors"; exit 1; }
