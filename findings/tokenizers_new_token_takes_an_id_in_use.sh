#!/usr/bin/env bash
# tokenizers 0.23.3 (PyPI).
#
# Expected: a token added to a vocabulary gets an id of its own, also where the ids of the vocabulary have a gap.
# Seen: the next id is the number of tokens, not the largest id plus one. With ids 0, 1, 2 and 4 the new token gets id 4,
#   which "four" has; nothing warns, and decoding 4 gives the new token.
# Output seen:
#   ids before: {'one': 0, 'two': 1, 'three': 2, 'four': 4}
#   id of <Path>: 4, id of four: 4, decoded: '<Path>'
#
# Exits with 0 if the ids collide, with another status if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3 2> "$work/errors" || { cat "$work/errors"; exit 1; }
"$work/venv/bin/python" - <<'PY'
import sys

from tokenizers import Tokenizer, models

vocabulary = {"one": 0, "two": 1, "three": 2, "four": 4}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="one"))
print("ids before:", vocabulary)
tokenizer.add_special_tokens(["<Path>"])
new, old = tokenizer.token_to_id("<Path>"), tokenizer.token_to_id("four")
print(f"id of <Path>: {new}, id of four: {old}, decoded: {tokenizer.decode([4], skip_special_tokens=False)!r}")
sys.exit(0 if new == old else 1)
PY
