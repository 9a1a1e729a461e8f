#!/usr/bin/env bash
# xgrammar 0.2.9, beside it llguidance 1.9.1; transformers 5.23.0, tokenizers 0.23.3 (PyPI), torch 2.13.0 on the CPU.
#
# Expected: minLength and maxLength of a JSON schema bound how long a string is, not what it may hold. "Not empty" or
#   "at most 4000 characters" changes nothing for a text of 20 characters, a pattern that fits all texts nothing at all.
#   So it is with llguidance.
# Seen: a string with either of them, or with a pattern, may hold no escape at all: no newline, no quotation mark, no
#   backslash, no tab. pydantic's Field(min_length=1) is enough. Code comes on one line, and since a bare quotation mark
#   is allowed still, as the end of the string, a text ends where it wants to quote. The answer is valid JSON that keeps
#   to the schema, nothing warns, and scores of a model look worse than it is. (The tracker knows it: issue 800, open.)
# Output seen (what a string that is long enough and short enough may hold):
#   xgrammar, str:                  newline quote backslash tab accent
#   xgrammar, min_length=1:         accent
#   xgrammar, max_length=4000:      accent
#   xgrammar, pattern=^[\s\S]*$:    accent
#   llguidance, str:                newline quote backslash tab accent
#   llguidance, min_length=1:       newline quote backslash tab accent
#   llguidance, max_length=4000:    newline quote backslash tab accent
#   llguidance, pattern=^[\s\S]*$:  newline quote backslash tab accent
# Leaving lengths and patterns out of the schema that goes to the engine, and checking them afterwards, avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet xgrammar==0.2.9 llguidance==1.9.1 transformers==5.23.0 tokenizers==0.23.3 \
  torch==2.13.0 numpy 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/lengths.py" <<'PY'
import json
import sys

import llguidance
import llguidance.hf
import xgrammar
from pydantic import BaseModel, Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
core.add_special_tokens(["<eos>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer)))
guide = llguidance.hf.from_tokenizer(tokenizer, n_vocab=len(tokenizer))


class Plain(BaseModel):
    text: str


class NotEmpty(BaseModel):
    text: str = Field(min_length=1)


class Bounded(BaseModel):
    text: str = Field(max_length=4000)


class Anything(BaseModel):
    text: str = Field(pattern=r"^[\s\S]*$")


def xgrammar_accepts(schema, ids):
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
    return all(matcher.accept_token(token) for token in ids)


def llguidance_accepts(schema, ids):
    matcher = llguidance.LLMatcher(guide, llguidance.LLMatcher.grammar_from_json_schema(schema))
    return matcher.validate_tokens(ids) == len(ids)


FIELDS = {"str": Plain, "min_length=1": NotEmpty, "max_length=4000": Bounded, r"pattern=^[\s\S]*$": Anything}
KINDS = {"newline": "a\nb", "quote": 'a"b', "backslash": "a\\b", "tab": "a\tb", "accent": "aéb"}
as_described = True
for engine, accepts in {"xgrammar": xgrammar_accepts, "llguidance": llguidance_accepts}.items():
    for field, model in FIELDS.items():
        seen = []
        for kind, text in KINDS.items():
            answer = model(text=text).model_dump_json()
            if accepts(model.model_json_schema(), [*tokenizer.encode(answer), tokenizer.eos_token_id]):
                seen.append(kind)
        print(f"{engine}, {field}:".ljust(31), " ".join(seen))
        is_short = engine == "xgrammar" and model is not Plain
        as_described &= seen == (["accent"] if is_short else list(KINDS))
sys.exit(0 if as_described else 1)
PY
OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/lengths.py"
