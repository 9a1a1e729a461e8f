#!/usr/bin/env bash
# llguidance 1.9.1, tokenizers 0.22.2 (PyPI).
#
# Expected: what a mask allows can be consumed. A token that a tokenizer adds without calling it special, as Qwen's
#   <tool_call> and <think>, is text like any other: it spells its letters in a grammar, or it does not.
# Seen: both. LLTokenizer takes an added token in angle brackets for a special one, whose letters no text of a grammar
#   fits. But where only one text can come next, as in a literal or an enum of a JSON schema, the mask is the first token
#   of that text as the tokenizer cuts it: here that very token, alone. consume_token refuses it, and the answer ends
#   with an error; the letters as other tokens, which would fit, are not allowed.
# Output seen (ids: 256 is <tool_call>, added as special or not):
#   special False: the mask of the literal "<tool_call>!" allows ['<tool_call>']; consumed: False; letter by letter: True
#   special False: the mask of the token <[256]> allows ['<tool_call>']; consumed: True
# A grammar that names the token by its id avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet llguidance==1.9.1 tokenizers==0.22.2 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/forced.py" <<'PY'
import sys

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
tokenizer.add_special_tokens(["<end>"])
call, end = (tokenizer.token_to_id(text) for text in ("<tool_call>", "<end>"))
read = LLTokenizer(tokenizer.to_str(), eos_token=end)


def begin(start):
    matcher = LLMatcher(read, LLMatcher.grammar_from_lark(f"%llguidance {{}}\nstart: {start}\n"), log_level=0)
    assert not matcher.is_error()
    return matcher


def forced(start):
    """What the first mask allows, and whether that can be consumed."""
    matcher = begin(start)
    mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    ids = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
    return [tokenizer.id_to_token(one) for one in ids], matcher.consume_token(ids[0])


def spelled(start, text):
    matcher = begin(start)
    return all(matcher.consume_token(tokenizer.token_to_id(letter)) for letter in text)


literal, by_id = forced('"<tool_call>!"'), forced(f"<[{call}]> \"!\"")
fits = spelled('"<tool_call>!"', "<tool_call>!")
print(f'special False: the mask of the literal "<tool_call>!" allows {literal[0]}; consumed: {literal[1]}; '
      f"letter by letter: {fits}")
print(f"special False: the mask of the token <[{call}]> allows {by_id[0]}; consumed: {by_id[1]}")
sys.exit(0 if (literal, fits, by_id) == ((["<tool_call>"], False), True, (["<tool_call>"], True)) else 1)
PY
"$work/venv/bin/python" "$work/forced.py"
