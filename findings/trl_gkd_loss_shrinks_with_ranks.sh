#!/usr/bin/env bash
# trl 1.16.0 (trl.experimental.gkd), transformers 5.24.0, accelerate 1.15.0, datasets 5.2.0 (PyPI), torch 2.13.0 on the
# CPU (gloo, one and two ranks).
#
# Guess before trying: Trainer counts the labels of all ranks for a loss to be divided by, and DDP averages the ranks'
#   gradients: a trainer with a loss of its own has to multiply by the ranks.
# Expected: GKDTrainer's loss is the mean divergence of student and teacher over a step's tokens: the same rows give
#   the same loss and the same step on one rank and on several, as with SFTTrainer. With lmbda=1, where the student
#   writes all answers, those of the data set, which nobody trains on then, do not matter.
# Seen: loss and gradient are divided by the number of ranks. With lmbda=1 the sum over the student's tokens is divided
#   by the number of tokens in the data set's answers: with answers five times as long there the step is a fifth. So
#   the learning rate of SGD and Muon, the norm that max_grad_norm cuts at and what weight decay is weighed against move
#   with the size of the cluster and with data that are not trained on, and the losses of two runs do not compare.
#   Nothing warns. (The count was brought in for accumulation, issue 4719, where it is right; pull request 6452 tells of
#   the data set's answers for DistillationTrainer, which has been corrected since.)
# Output seen (loss and length of one step of SGD on eight rows; accumulation: microbatches of each rank):
#   1 rank  SFTTrainer                            accumulation 1: loss  6.136, step  0.4116
#   1 rank  GKDTrainer                            accumulation 1: loss  0.398, step  0.0210
#   1 rank  SFTTrainer                            accumulation 2: loss  6.136, step  0.4116
#   1 rank  GKDTrainer                            accumulation 2: loss  0.398, step  0.0210
#   1 rank  GKDTrainer, counted by rank           accumulation 1: loss  0.398, step  0.0210
#   1 rank  GKDTrainer, lmbda=1, 4 words in data  accumulation 1: loss  0.357, step  0.0162
#   1 rank  GKDTrainer, lmbda=1, 40 words in data accumulation 1: loss  0.068, step  0.0031
#   2 ranks SFTTrainer                            accumulation 1: loss  6.136, step  0.4116
#   2 ranks GKDTrainer                            accumulation 1: loss  0.199, step  0.0105
#   2 ranks SFTTrainer                            accumulation 2: loss  6.136, step  0.4116
#   2 ranks GKDTrainer                            accumulation 2: loss  0.199, step  0.0105
#   2 ranks GKDTrainer, counted by rank           accumulation 1: loss  0.398, step  0.0213
#   2 ranks GKDTrainer, lmbda=1, 4 words in data  accumulation 1: loss  0.175, step  0.0128
#   2 ranks GKDTrainer, lmbda=1, 40 words in data accumulation 1: loss  0.033, step  0.0024
# average_tokens_across_devices=False avoids the first ("counted by rank"), up to ranks with unequally many tokens.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 \
  numpy 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/distil.py" <<'PY'
import json
import os
import sys
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

ranks, main = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)) == 0
words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} </s> {% endfor %}"


def model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def conversations(length):
    """Eight prompts, with answers of about `length` words, no two equally long unless `length` is."""
    answers = [" ".join(f"w{(row * place) % 60}" for place in range(length + row)) for row in range(8)]
    turns = [[{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": answer}] for answer in answers]
    return Dataset.from_list([{"messages": turn} for turn in turns])


def step(name, config, trainer, accumulation=1, length=4, **options):
    """Loss and length of the one step that all eight rows give."""
    student = model(0)
    before = torch.cat([weight.detach().flatten().clone() for weight in student.parameters()])
    with TemporaryDirectory() as folder:
        arguments = config(
            folder, per_device_train_batch_size=8 // ranks // accumulation, gradient_accumulation_steps=accumulation,
            max_steps=1, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=0,
            report_to=[], use_cpu=True, bf16=False, save_strategy="no", logging_steps=1, disable_tqdm=True,
            gradient_checkpointing=False, **options,
        )  # fmt: skip
        teacher = {"teacher_model": model(1)} if config is GKDConfig else {}
        run = trainer(
            model=student, args=arguments, train_dataset=conversations(length), processing_class=tokenizer, **teacher
        )
        run.train()
    after = torch.cat([weight.detach().flatten() for weight in student.parameters()])
    loss, moved = run.state.log_history[0]["loss"], (after - before).norm().item()
    if main:
        print(
            f"{ranks} rank{'s' if ranks > 1 else ' '} {name:37} accumulation {accumulation}: "
            f"loss {loss:6.3f}, step {moved:7.4f}", flush=True,
        )  # fmt: skip
    return loss, moved


found = {}
for accumulation in (1, 2):
    found[f"sft{accumulation}"] = step("SFTTrainer", SFTConfig, SFTTrainer, accumulation)
    found[f"gkd{accumulation}"] = step("GKDTrainer", GKDConfig, GKDTrainer, accumulation, lmbda=0.0)
apart = {"average_tokens_across_devices": False}
found["local"] = step("GKDTrainer, counted by rank", GKDConfig, GKDTrainer, lmbda=0.0, **apart)
for length in (4, 40):
    name = f"GKDTrainer, lmbda=1, {length} words in data"
    found[f"own{length}"] = step(name, GKDConfig, GKDTrainer, length=length, lmbda=1.0, max_new_tokens=8)
if main:
    with open(f"{sys.argv[1]}/{ranks}.json", "w") as file:
        json.dump(found, file)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
PY
cat > "$work/judge.py" <<'PY'
import json
import math
import sys
from pathlib import Path

one, two = (json.loads(Path(sys.argv[1], f"{ranks}.json").read_text()) for ranks in (1, 2))


def ratio(first, second):
    return [a / b for a, b in zip(first, second, strict=True)]


def close(numbers, wanted):
    return all(math.isclose(number, wanted, rel_tol=0.02) for number in numbers)


as_described = close(ratio(one["sft1"], two["sft1"]), 1) and close(ratio(one["sft1"], two["sft2"]), 1)
as_described &= close(ratio(one["gkd1"], one["gkd2"]), 1)
as_described &= close(ratio(one["gkd1"], two["gkd1"]), 2) and close(ratio(one["gkd1"], two["gkd2"]), 2)
as_described &= all(found["own4"][1] > 3 * found["own40"][1] for found in (one, two))
sys.exit(0 if as_described else 1)
PY
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TRL_EXPERIMENTAL_SILENCE=1 OMP_NUM_THREADS=1
for ranks in 1 2; do
  if [ "$ranks" = 1 ]; then launch=("$work/venv/bin/python" -W ignore); else
    launch=("$work/venv/bin/torchrun" --standalone --nproc-per-node 2); fi
  "${launch[@]}" "$work/distil.py" "$work" 2> "$work/errors" > "$work/output" || { tail -20 "$work/errors"; exit 1; }
  grep -E "^[12] rank" "$work/output"
done
"$work/venv/bin/python" "$work/judge.py" "$work"
