#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 on the CPU (one process), PyPI.
#
# Expected: generate() with prompts of different lengths, padded at the left and with their attention_mask, gives each of
#   them the tokens that it gets alone, in MiniMax (lightning attention in some layers, softmax in others) as in Llama.
# Seen: where a lightning layer comes first, only the first new token is right. From the second on, rows with padding go
#   astray: the mask of the softmax layers is made for as many keys as layer 0 has cached, which are none if it is a
#   lightning layer. One column is left, that of the first padding token, and it hides every key. One token of padding is
#   enough. A single pass over padded rows is right, so that comparing logits or training shows nothing, and nothing warns.
#   In a batch of an evaluation or of rollouts, all answers but those to the longest prompts are affected.
#   Without padding, several tokens after a kept cache (the next turn of a chat, a prompt in pieces) go astray alike.
# Output seen (how far the logits of each new token are from those of the prompt alone, in their standard deviation):
#   Llama                     one pass 0.000  new tokens 0.000 0.000 0.000 0.000 0.000 0.000  same text True
#   MiniMax, softmax first    one pass 0.000  new tokens 0.000 0.000 0.000 0.000 0.000 0.000  same text True
#   MiniMax, lightning first  one pass 0.000  new tokens 0.000 0.226 2.444 2.939 2.972 2.664  same text False
#     prompts of one length:                  new tokens 0.000 0.000 0.000 0.000 0.000 0.000  same text True
#   Four tokens after a cache of sixteen, softmax first: 0.000, lightning first: 0.658
# Batches of prompts of one length, each read in one piece, avoid it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/padded.py" <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MiniMaxConfig

SIZE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYERS = ["linear_attention", "full_attention"] * 2
CONFIGS = {
    "Llama": LlamaConfig(**SIZE),
    "MiniMax, softmax first": MiniMaxConfig(num_local_experts=4, num_experts_per_tok=2, layer_types=LAYERS[::-1], **SIZE),
    "MiniMax, lightning first": MiniMaxConfig(num_local_experts=4, num_experts_per_tok=2, layer_types=LAYERS, **SIZE),
}
NEW = 6
numbers = torch.Generator().manual_seed(1)
long, short, other = (torch.randint(3, 96, (length,), generator=numbers) for length in (20, 9, 20))


def batch(prompts):
    """Token ids and attention mask of prompts, padded at the left."""
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def generated(model, prompts):
    """Greedy tokens and their logits, [prompts, new, ...] each."""
    found = model.generate(
        **batch(prompts), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return found.sequences[:, -NEW:], torch.stack(found.logits, dim=1)


def away(found, wanted):
    return ((found - wanted).abs().amax(-1) / wanted.std()).tolist()


def compare(model, prompts):
    """The second of two prompts in a batch beside itself alone: distances of its logits, and whether the tokens agree."""
    (tokens, logits), (own_tokens, own_logits) = generated(model, prompts), generated(model, prompts[1:])
    return away(logits[1], own_logits[0]), torch.equal(tokens[1], own_tokens[0])


@torch.no_grad()
def continued(model):
    """How far the logits of four tokens read after a cache of sixteen are from those of all twenty in one piece."""
    cache = model(long[None, :16], use_cache=True).cache
    return max(away(model(long[None, 16:], cache=cache, use_cache=True).logits[0], model(long[None]).logits[0, 16:]))


as_described, pieces = True, {}
for name, config in CONFIGS.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
        rows = batch([long, short])
        places = (rows["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        last = model(**rows, position_ids=places).logits[1, -1:]
        one_pass = away(last, model(short[None]).logits[0, -1:])[0]
    steps, same = compare(model, [long, short])
    print(f"{name:24}  one pass {one_pass:.3f}  new tokens {' '.join(f'{step:.3f}' for step in steps)}  same text {same}")
    as_described &= one_pass < 1e-3 and steps[0] < 1e-3
    pieces[name] = continued(model) if "MiniMax" in name else 0.0
    if "lightning" not in name:
        as_described &= same and max(steps) < 1e-3
    else:
        as_described &= not same and min(steps[1:]) > 0.1
        steps, same = compare(model, [long, other])
        print(f"{'  prompts of one length:':42}new tokens {' '.join(f'{step:.3f}' for step in steps)}  same text {same}")
        as_described &= same and max(steps) < 1e-3
_, right, wrong = pieces.values()
print(f"Four tokens after a cache of sixteen, softmax first: {right:.3f}, lightning first: {wrong:.3f}")
as_described &= right < 1e-3 and wrong > 0.1
sys.exit(0 if as_described else 1)
PY
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=1
"$work/venv/bin/python" -W ignore "$work/padded.py" 2> "$work/errors" || { tail -5 "$work/errors"; exit 1; }
