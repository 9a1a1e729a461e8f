"""Host time of answers that are held to a grammar: what each of their tokens waits for.

    python -m benchmarks.bench_grammar

A vocabulary of random words, as large as Qwen2.5's, and JSON drawn at random from what its schema allows. Prints the
time in which the tokenizer is read and the schema compiled, once each, and for each token the time of its mask.
"""

from __future__ import annotations

import datetime
import json
import random
import statistics
import string
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_multiverse.checkout import commit_here
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import SamplingParams
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.inference.text.guide import Grammars, Guide
from megatron_multiverse.structure import TAGS, StructureVocab

END = "<|endoftext|>"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"x": {"type": "number"}, "tag": {"type": "string"}},
                "required": ["x", "tag"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["name", "items"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed."""

    vocab_size: int = 152064
    """Ids."""
    tokens: int = 2000
    """Tokens drawn, over as many answers as they make."""
    output: Path | None = None
    """JSON file for the figures."""


def made_up_tokenizer(size: int) -> Tokenizer:
    """A tokenizer of random words of up to nine characters, half of them behind a blank, and the tags."""
    rng = random.Random(0)
    words = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters = string.ascii_letters + string.digits + string.punctuation
    while len(words) < size - len(TAGS) - 1:
        blank = "Ġ" if rng.random() < 0.5 else ""
        words.setdefault(blank + "".join(rng.choices(letters, k=rng.randint(2, 9))), len(words))
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*TAGS, END])
    return tokenizer


def draw(begin: Callable[[], Guide], count: int) -> list[float]:
    """Seconds of the masks of so many tokens, drawn at random from what they allow."""
    rng, seconds = np.random.default_rng(0), []
    guide = begin()
    for _ in range(count):
        start = time.perf_counter()
        mask = guide.mask()
        seconds.append(time.perf_counter() - start)
        fitting = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        guide.push(int(rng.choice(fitting)))
        if guide.is_complete or guide.error:
            guide = begin()
    return seconds


def measure(options: Options) -> dict[str, Any]:
    """All figures."""
    tokenizer = made_up_tokenizer(options.vocab_size)
    ids: dict[str, int] = tokenizer.get_vocab()
    size, end, brace = len(ids), ids[END], ids["{"]
    pieces = [piece.replace("Ċ", "\n") for piece in sorted(ids, key=ids.__getitem__)]
    vocab = StructureVocab.from_pieces(pieces, eos_id=end)
    grammars = Grammars(tokenizer.to_str(), vocab, size)
    params = SamplingParams(grammar=json.dumps(SCHEMA))
    ends = frozenset((end,))
    times = []
    for call in (grammars.prepare, lambda: grammars.begin(params, ends)):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)

    def begin() -> Guide:
        guide = grammars.begin(params, ends)
        guide.push(brace)
        return guide

    masks = sorted(draw(begin, options.tokens))
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit_here() or "",
        "command": "python -m benchmarks.bench_grammar",
        "ids": size,
        "tokens": len(masks),
        "tokenizer_s": round(times[0], 3),
        "compile_ms": round(1000 * times[1], 2),
        "mask_us_median": round(1e6 * statistics.median(masks), 1),
        "mask_us_95_percent": round(1e6 * masks[int(0.95 * len(masks))], 1),
        "mask_us_most": round(1e6 * masks[-1], 1),
    }


def main() -> None:
    """Measure, print, and write if asked."""
    options = parse_options(Options)
    found = measure(options)
    print(json.dumps(found, indent=2))
    if options.output:
        write_json_atomic(options.output, found)


if __name__ == "__main__":
    run_tool(main)
