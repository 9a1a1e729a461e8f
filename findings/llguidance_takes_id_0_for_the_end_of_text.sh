#!/usr/bin/env bash
# llguidance 1.9.1, tokenizers 0.22.2 (PyPI).
#
# Expected: a tokenizer.json without special tokens, as a base vocabulary before its chat tokens are added, has no end of
#   text: LLTokenizer says so or asks for eos_token, and masks allow the text of every token where it fits.
# Seen: without a word id 0 becomes the end of text. In byte-level vocabularies that is "!": once a grammar is complete it
#   is the one id that masks allow, so a server that draws by them puts "!" behind each answer, or waits for an end that
#   the model does not know. Where a grammar has "!" as well, one bit says both, and the matcher takes it for the end.
# Output seen (ids: 0 is "!", 64 is "a"; the grammar [a!]{2}, and at the end [a!]*):
#   eos_token 0: at the beginning [0, 64], after "a" [0, 64], after "aa" [0]; "!" ends [a!]*: True
#   eos_token 256: at the beginning [0, 64], after "a" [0, 64], after "aa" [256]; "!" ends [a!]*: False
# eos_token given as the id of a token that no text has avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet llguidance==1.9.1 tokenizers==0.22.2 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/end.py" <<'PY'
import sys

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
a = tokenizer.token_to_id("a")


def masks(read):
    matcher = LLMatcher(read, LLMatcher.grammar_from_regex("[a!]{2}"))
    found = []
    for _ in range(3):
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        found.append(np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist())
        if len(found) < 3:
            assert matcher.consume_token(a)
    return found


def stops(read):
    """Whether "!" after "a" ends [a!]*, of which it is a part."""
    matcher = LLMatcher(read, LLMatcher.grammar_from_regex("[a!]*"))
    assert matcher.consume_token(a) and matcher.consume_token(0)
    return matcher.is_stopped()


def told(read):
    found = 'at the beginning {}, after "a" {}, after "aa" {}'.format(*masks(read))
    return f'eos_token {read.eos_token}: {found}; "!" ends [a!]*: {stops(read)}'


plain = LLTokenizer(tokenizer.to_str())
tokenizer.add_special_tokens(["<end>"])
end = tokenizer.token_to_id("<end>")
having = LLTokenizer(tokenizer.to_str(), eos_token=end)
print(told(plain), told(having), sep="\n")
seen = [(read.eos_token, masks(read), stops(read)) for read in (plain, having)]
expected = [(0, [[0, a], [0, a], [0]], True), (end, [[0, a], [0, a], [end]], False)]
sys.exit(0 if seen == expected else 1)
PY
"$work/venv/bin/python" "$work/end.py"
