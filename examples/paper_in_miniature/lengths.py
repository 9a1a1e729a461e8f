"""How long right answers are: tokens in sequence beside the longest chain of the parallel text.

No model is needed for that, so it bounds what parallel decoding can save on these tasks: a model that answers right
takes exactly so many steps. Lengths of trained models, with their errors, are in the results of their runs.
"""

from __future__ import annotations

import random
from pathlib import Path
from statistics import mean
from typing import Any

from settings import tokenizer
from tasks import Problem, sample_arithmetic, sample_satisfiability

from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.structure import measure, parse

CHAINS = (2, 3, 4, 6, 8, 12)
STEPS = 4
VARIABLES = (3, 4, 5, 6, 7, 8)


def measure_lengths(path: Path, count: int) -> None:
    """Write mean lengths over `count` problems of each size."""
    made = tokenizer()
    rng = random.Random("lengths")
    found = {
        "chains": [_means(made, k, [sample_arithmetic(rng, k, (STEPS, STEPS)) for _ in range(count)]) for k in CHAINS],
        "variables": [_means(made, n, [sample_satisfiability(rng, n) for _ in range(count)]) for n in VARIABLES],
    }
    write_json_atomic(path, {"problems": count, **found})


def _means(made: MultiverseTokenizer, size: int, problems: list[Problem]) -> dict[str, Any]:
    tagged = [parse(ids, made.structure_vocab) for ids in made.tokenize_batch([p.response("tagged") for p in problems])]
    statistics = [measure(document) for document in tagged]
    return {
        "size": size,
        "plain": mean(map(len, made.tokenize_batch([problem.response("plain") for problem in problems]))),
        "tagged": mean(one.num_tokens for one in statistics),
        "critical": mean(one.critical_tokens for one in statistics),
    }
