#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0 (PyPI), torch 2.13.0 on the CPU.
#
# Expected: eval_loss of a language model is the mean over the labels of the evaluation data, as the loss that Trainer
#   trains by is since it counts the labels of a whole step: the same weights and rows give the same number with any
#   per_device_eval_batch_size, and exp(eval_loss) is the perplexity.
# Seen: it is a mean of the batches' means, weighed by their rows, however many labels each batch has. Where rows
#   differ in length, and most where only answers have labels, it moves with the batch size, with the order of the rows
#   and with group_by_length. Of two models one is better with batches of 1 and the other with batches of 8, so that
#   early stopping and load_best_model_at_end keep another checkpoint. The training loss of the same rows and weights is
#   right throughout, so the gap between both is not what it seems to be. Nothing warns.
# Output seen (8 rows with 1, 2 or 40 labels; two models, the first one is better on short answers):
#   by labels: first 3.64, second 1.24
#   batches of 1: eval_loss first 1.69, second 3.18; training loss first 3.64, second 1.24
#   batches of 2: eval_loss first 2.38, second 2.49; training loss first 3.64, second 1.24
#   batches of 8: eval_loss first 3.64, second 1.24; training loss first 3.64, second 1.24
# compute_metrics that adds up losses and labels itself avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0 torch==2.13.0 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/loss.py" <<'PY'
import math
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, logging

logging.set_verbosity_error()
SHORT, LONG, PROMPT = 5, 9, [1, 2, 3]


def row(answer):
    """A prompt without labels and an answer with one label per token."""
    return {"input_ids": PROMPT + answer, "labels": [-100] * len(PROMPT) + answer}


ROWS = [row(answer) for answer in 3 * [[SHORT]] + [[LONG] * 40] + 3 * [[SHORT] * 2] + [[LONG] * 40]]


def collate(rows):
    """Rows of one batch, padded at the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    columns = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])
        for name, filler in columns.items()
    }
    return batch | {"attention_mask": (batch["input_ids"] != 0).long()}


def model_that_knows(token):
    """A small Llama whose logits are constant: `token` has 3, all others have noise."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = LlamaForCausalLM(config)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.1 + 3 * torch.eye(32)[token])
    return model


def trainer_of(model, size):
    arguments = TrainingArguments(
        output_dir=sys.argv[1], use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no",
        per_device_eval_batch_size=size, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
        max_steps=1, learning_rate=0.0,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS, data_collator=collate)


def by_labels(model):
    """The mean over all labels, written out."""
    batch = collate(ROWS)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).item()


models = [model_that_knows(SHORT), model_that_knows(LONG)]
wanted = [by_labels(model.eval()) for model in models]
print(f"by labels: first {wanted[0]:.2f}, second {wanted[1]:.2f}")
seen = {}
as_described = True
for size in (1, 2, 8):
    trainers = [trainer_of(model, size) for model in models]
    seen[size] = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    trained = [trainer.train().training_loss for trainer in trainers]
    print(
        f"batches of {size}: eval_loss first {seen[size][0]:.2f}, second {seen[size][1]:.2f}; "
        f"training loss first {trained[0]:.2f}, second {trained[1]:.2f}"
    )
    as_described &= all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(trained, wanted, strict=True))
as_described &= all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(seen[8], wanted, strict=True))
as_described &= seen[1][0] < seen[1][1] - 0.5 and seen[8][0] > seen[8][1] + 0.5
sys.exit(0 if as_described else 1)
PY
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
"$work/venv/bin/python" -W ignore "$work/loss.py" "$work/run" 2> "$work/errors" | grep -v "^{" \
  || { tail -5 "$work/errors"; exit 1; }
