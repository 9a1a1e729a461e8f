#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3 (PyPI).
#
# Expected: a tokenizer of one's own that save_pretrained() wrote reads the same when AutoTokenizer opens it: the folder has
#   its tokenizer.json, and tokenizer_config.json names the general class, TokenizersBackend, which takes that file as it is.
#   What model lies beside it does not matter. So it is without config.json and with that of a Llama or a Qwen3.
# Seen: with the config.json of a Qwen2 model beside it, AutoTokenizer makes a Qwen2Tokenizer: of tokenizer.json only
#   vocabulary, merges and added tokens are kept, how text is cut before and joined afterwards are Qwen2's. Digits that
#   were one token fall apart, a tokenizer by words finds nothing at all, one of SentencePiece's kind loses every blank.
#   A model trained with the ids of that tokenizer.json is served others, and nothing warns.
# Output seen ("The year 1234 has 365 days", number of tokens and what they decode to):
#   bytes:  alone 6, llama 6, qwen3 6, qwen2 13: The year 1234 has 365 days
#   pieces: alone 6, llama 6, qwen3 6, qwen2 13: Theyear1234has365days
#   words:  alone 6, llama 6, qwen3 6, qwen2 0:
# PreTrainedTokenizerFast.from_pretrained(folder) reads what was saved in every case.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/open.py" <<'PY'
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

TEXT = "The year 1234 has 365 days"
CONFIGS = {"alone": None, "llama": LlamaConfig, "qwen3": Qwen3Config, "qwen2": Qwen2Config}
COMMON = {"special_tokens": ["<unk>", "<eos>"], "show_progress": False}


def trained(model, cut, join, trainer):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = cut
    if join is not None:
        tokenizer.decoder = join
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    return tokenizer


def tokenizers():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    yield "bytes", trained(
        models.BPE(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **COMMON),
    )
    yield "pieces", trained(
        models.BPE(unk_token="<unk>"),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
        trainers.BpeTrainer(vocab_size=100, **COMMON),
    )
    yield "words", trained(
        models.WordLevel(unk_token="<unk>"), pre_tokenizers.Whitespace(), None, trainers.WordLevelTrainer(**COMMON)
    )


def main(work):
    as_seen = True
    for name, tokenizer in tokenizers():
        own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
        want = tokenizer.encode(TEXT).ids
        counts = []
        for beside, config in CONFIGS.items():
            folder = f"{work}/{name}/{beside}"
            own.save_pretrained(folder)
            if config is not None:
                config().save_pretrained(folder)
            opened = AutoTokenizer.from_pretrained(folder)
            ids = opened(TEXT)["input_ids"]
            counts.append(f"{beside} {len(ids)}")
            as_seen &= (ids == want) == (beside != "qwen2")
            as_seen &= PreTrainedTokenizerFast.from_pretrained(folder)(TEXT)["input_ids"] == want
        print(f"{name + ':':7} {', '.join(counts)}: {opened.decode(ids)}")
        as_seen &= type(opened).__name__ == "Qwen2Tokenizer"
    sys.exit(0 if as_seen else 1)


main(sys.argv[1])
PY
export HF_HUB_OFFLINE=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1
"$work/venv/bin/python" "$work/open.py" "$work" 2> "$work/errors" || { tail -3 "$work/errors"; exit 1; }
# Nothing but the note that there is no torch, which a tokenizer does not need, may have been said.
if grep -i tokeniz "$work/errors"; then exit 1; fi
