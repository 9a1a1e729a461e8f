"""Answers of a trained model to held problem sets: right or wrong, their lengths, and their wall clock."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from chains import without_links
from settings import Size, tokenizer
from tasks import REQUESTS, Problem, check, sample_arithmetic, sample_satisfiability
from training_rows import FEWEST_VARIABLES, MOST_CHAINS, MOST_VARIABLES, Kind, RowConfig, text_of

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.inference import Engine, Request, Result
from megatron_multiverse.structure import measure, parse

logger = logging.getLogger(__name__)
Mode = Literal["parallel", "one branch at a time", "plain"]
TIMED_STEPS = 4
"""Steps of each chain of the problems whose wall clock is measured, so that only the number of paths differs."""


def problem_sets(count: int, rows: RowConfig) -> dict[str, list[Problem]]:
    """The sets of the evaluation, see `problem_set`, by name."""
    sizes = {
        "chains": [*range(2, MOST_CHAINS + 1), MOST_CHAINS + 2, 2 * MOST_CHAINS, 3 * MOST_CHAINS],
        "variables": range(FEWEST_VARIABLES, MOST_VARIABLES + 2),
    }
    names = (f"{task}-{number}" for task, numbers in sizes.items() for number in numbers)
    return {name: problem_set(name, count, rows) for name in names}


def problem_set(name: str, count: int, rows: RowConfig) -> list[Problem]:
    """`count` problems of ``chains-N`` or ``variables-N``, the same in every run but for how `rows` words them. No
    training row has their seed."""
    task, size = name.split("-")
    number, rng = int(size), random.Random(f"evaluation:{name}")
    if task == "variables":
        searches = (sample_satisfiability(rng, number) for _ in range(count))
        return [replace(one, back_links=rows.back_links) for one in searches]
    drawn = (sample_arithmetic(rng, number) for _ in range(count))
    found = [replace(one, copies_rest=rows.copies_rest) for one in drawn]
    return [problem if rows.links else without_links(problem) for problem in found]


def timed_problems(num_chains: int, count: int) -> list[Problem]:
    """Problems for the wall clock."""
    rng = random.Random(f"wall clock:{num_chains}")
    return [sample_arithmetic(rng, num_chains, (TIMED_STEPS, TIMED_STEPS)) for _ in range(count)]


class Answerer:
    """A trained model with an engine around it.

    Args:
        folder: of the model.
        kind: what it was trained as. Only a multiverse model forks; tags of the others are text.
        size: of the miniature.
    """

    def __init__(self, folder: Path, kind: Kind, size: Size) -> None:
        is_gpu = torch.cuda.is_available()
        self.kind = kind
        self.tokenizer = tokenizer()
        model, _ = load_checkpoint(
            folder, dtype=torch.bfloat16 if is_gpu else torch.float32, device="cuda" if is_gpu else "cpu"
        )
        self.size = size
        rows = 1024 if is_gpu else 64
        self.engine = Engine(
            model.eval(),
            self.tokenizer.structure_vocab,
            EngineConfig(num_pages=(128 if is_gpu else 32) * rows, max_rows=rows, prefix_cache=False),
            vocab_size=self.tokenizer.vocab_size,
        )

    def request(self, problem: Problem, mode: Mode) -> Request:
        """What is asked of the engine. An answer that grows far beyond the right one is wrong already: it is ended."""
        sampling = SamplingParams(
            max_tokens=self.size.max_tokens,
            max_critical_tokens=self.steps_of_right_answer(problem) * 5 // 4 + 64,
            max_depth=None if self.kind == "multiverse" else 0,
            max_concurrent_branches=1 if mode == "one branch at a time" else None,
        )
        text = problem.prompt + REQUESTS[text_of(self.kind)]
        return Request(prompt_ids=self.tokenizer.tokenize(text), sampling=sampling)

    def steps_of_right_answer(self, problem: Problem) -> int:
        """Tokens on the longest chain of the right answer, as this kind of model writes it."""
        ids = self.tokenizer.tokenize(problem.response(text_of(self.kind)))
        return (
            measure(parse(ids, self.tokenizer.structure_vocab)).critical_tokens
            if self.kind == "multiverse"
            else len(ids)
        )

    def answer(self, problems: Sequence[Problem], mode: Mode) -> tuple[list[Result], float]:
        """All problems together, greedily; the answers, and the seconds that they took."""
        requests = [self.request(problem, mode) for problem in problems]
        start = time.perf_counter()
        results = self.engine.generate(requests)
        return results, time.perf_counter() - start

    def is_right(self, problem: Problem, result: Result) -> bool:
        """Whether the answer that stands at the end is right."""
        return check(problem, self.tokenizer.detokenize(result.token_ids))

    def where_wrong(self, problem: Problem, result: Result) -> str:
        """Where an answer leaves the right one: what is shared before, what is right, and what was written."""
        wanted, given = problem.response(text_of(self.kind)), self.tokenizer.detokenize(result.token_ids)
        pairs = enumerate(zip(wanted, given, strict=False))
        shared = next((index for index, (a, b) in pairs if a != b), min(len(wanted), len(given)))
        parts = wanted[max(0, shared - 80) : shared], wanted[shared : shared + 50], given[shared : shared + 50]
        return "{} after {!r} comes {!r}, not {!r}".format(problem.prompt[:70], *parts)


def accuracy(answerer: Answerer, sets: dict[str, list[Problem]]) -> dict[str, Any]:
    """For each set, lists over its problems: right, tokens, critical tokens, decode steps, malformed.

    All sets are one batch, the longest answers first, so that few steps are left with few rows.
    """
    found = {}
    asked = sorted(
        (
            (answerer.steps_of_right_answer(problem), name, problem)
            for name, problems in sets.items()
            for problem in problems
        ),
        key=lambda one: -one[0],
    )
    answers, _ = answerer.answer(
        [problem for _, _, problem in asked], "plain" if answerer.kind == "plain" else "parallel"
    )
    result_of = {id(problem): result for (_, _, problem), result in zip(asked, answers, strict=True)}
    for name, problems in sets.items():
        results = [result_of[id(problem)] for problem in problems]
        right = [int(answerer.is_right(*pair)) for pair in zip(problems, results, strict=True)]
        if 0 in right:
            index = right.index(0)
            logger.info("%s: %s", name, answerer.where_wrong(problems[index], results[index]))
        found[name] = {
            "right": right,
            "tokens": [len(result.token_ids) for result in results],
            "critical": [result.critical_tokens for result in results],
            "steps": [result.decode_steps for result in results],
            "malformed": sum(bool(set(result.malformed) - {"label_order"}) for result in results),
        }
    return found


def time_alone(answerers: dict[Mode, Answerer], size: Size) -> dict[str, Any]:
    """Seconds of one answer at a time, over the number of chains; the modes take turns at every problem. The best of
    five times: the first one may record graphs, and what else the host does adds half at times."""
    alone: dict[str, list[dict[str, Any]]] = {mode: [] for mode in answerers}
    for chains in size.timed_chains:
        for mode, answerer in answerers.items():
            answerer.answer(timed_problems(chains, 1), mode)  # compiles kernels and records graphs of this many rows
        for problem in timed_problems(chains, size.latency_problems):
            for mode, answerer in answerers.items():
                results, seconds = _best_of(5, answerer, [problem], mode)
                alone[mode].append(_row(answerer, [problem], results, seconds) | {"chains": chains})
    return alone


def time_batches(answerers: dict[Mode, Answerer], size: Size) -> dict[str, Any]:
    """Seconds of batches of answers with as many chains as were trained, the best of three times."""
    batched: dict[str, list[dict[str, Any]]] = {mode: [] for mode in answerers}
    for batch in size.batches:
        problems = timed_problems(MOST_CHAINS, batch)
        for mode, answerer in answerers.items():
            results, seconds = _best_of(3, answerer, problems, mode)
            batched[mode].append(_row(answerer, problems, results, seconds) | {"batch": batch})
    return batched


def _best_of(times: int, answerer: Answerer, problems: list[Problem], mode: Mode) -> tuple[list[Result], float]:
    return min((answerer.answer(problems, mode) for _ in range(times)), key=lambda one: one[1])


def _row(answerer: Answerer, problems: list[Problem], results: list[Result], seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 6),
        "tokens": sum(len(result.token_ids) for result in results),
        "critical": sum(result.critical_tokens for result in results),
        "right": sum(answerer.is_right(*pair) for pair in zip(problems, results, strict=True)),
    }
