#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3 (PyPI).
#
# Expected: apply_chat_template(return_assistant_tokens_mask=True, truncation=True) with truncation_side "left" marks those
#   tokens of assistant turns that are kept; whole turns near the end are marked in any case.
# Seen: once the first letter of the first assistant turn is cut away, no token is marked at all, those of later, whole turns
#   neither. A row that is trained on assistant tokens alone then trains nothing, and the longest conversations are
#   those that vanish. With the whole conversation, or cut at the right, the mask is right. Nothing warns.
# Output seen (a dot where the mask is 0):
#   whole        ........eins;........zwei;
#   right, 24    ........eins;........zwe
#   left, 18     eins;........zwei;
#   left, 17     .................
#   left, 8      ........
# Cutting ids and mask oneself, after a call without truncation, avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 jinja2 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/mask.py" <<'PY'
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# One token for each letter, so that masks can be printed below their texts.
letters = Tokenizer(models.BPE({c: k for k, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
letters.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
tokenizer.chat_template = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }};{% endgeneration %}"
    "{% else %}U:{{ m.content }};{% endif %}{% endfor %}"
)
messages = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "eins"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "zwei"},
]


def marked(**options):
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
    text = tokenizer.decode(found["input_ids"])
    return "".join(letter if mark else "." for letter, mark in zip(text, found["assistant_masks"], strict=True))


whole = marked()
print("whole       ", whole)
seen = []
for side, length in (("right", 24), ("left", 18), ("left", 17), ("left", 8)):
    tokenizer.truncation_side = side
    seen.append(marked(truncation=True, max_length=length))
    print(f"{side}, {length}".ljust(12), seen[-1])
wanted = [whole[:24], whole[-18:], "." * 17, "." * 8]
sys.exit(0 if whole == "........eins;........zwei;" and seen == wanted else 1)
PY
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
"$work/venv/bin/python" -W ignore "$work/mask.py" 2> "$work/errors" || { tail -3 "$work/errors"; exit 1; }
