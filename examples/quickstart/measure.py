"""The quickstart's measurements of a trained model; every figure beside its rival from the same run."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decode import BATCH_THREADS, Answers, Decoder, Mode
from task import Problem, render_parallel, sample_problem

from megatron_multiverse.structure import Block, parse_text
from megatron_multiverse.views.figures import draw_timeline
from megatron_multiverse.views.terminal import LiveBranches

MODES: tuple[Mode, ...] = ("parallel", "sequential", "autoregressive")
SHOWN = ((3, 2), (6, 1))
"""Expressions and depth of the problems on the screen: a nested block, and as many paths as 80 columns hold."""
Report = dict[str, Any]


def fresh_problems(count: int, *, seed: int, fewest: int = 2, most: int = 4, max_depth: int = 2) -> list[Problem]:
    """Held-out problems: none of them is in the training rows."""
    rng = random.Random(f"quickstart:{seed}")
    return [
        sample_problem(
            rng,
            num_expressions=rng.randint(fewest, most),
            max_depth=max_depth,
            exact_depth=max_depth > 2,
            split="held_out",
        )
        for _ in range(count)
    ]


def show_live(decoder: Decoder, *, seed: int) -> float:
    """Decode the problems that SHOWN asks for on the screen, one after the other.

    Returns:
        `time.perf_counter()` at the end of the first.
    """
    rng = random.Random(f"live:{seed}")
    ends = []
    for paths, depth in SHOWN:
        problem = sample_problem(rng, num_expressions=paths, max_depth=depth, exact_depth=True, split="held_out")
        title = render_parallel(problem)[0]
        with LiveBranches(decoder.tokenizer.detokenize, title=title) as live:
            answers = decoder.answer([problem], "parallel", on_token=live.on_token)
        ends.append(time.perf_counter())
        verdict = "right" if answers.correct[0] else f"WRONG, the answer is {problem.answer}"
        result = answers.results[0]
        print(f"-> {verdict}; {len(result.token_ids)} tokens in {result.decode_steps} steps\n", flush=True)
    return ends[0]


def measure_answers(decoder: Decoder, problems: list[Problem]) -> Report:
    """Accuracy, tokens and steps of the three modes over the same problems."""
    answers: dict[Mode, Answers] = {mode: decoder.answer(problems, mode) for mode in MODES}
    parallel, sequential, plain = (answers[mode] for mode in MODES)
    same = all(
        one.token_ids == other.token_ids and one.position_ids == other.position_ids
        for one, other in zip(parallel.results, sequential.results, strict=True)
    )
    return {
        "num_problems": len(problems),
        "accuracy": parallel.accuracy,
        "accuracy_sequential": sequential.accuracy,
        "accuracy_autoregressive": plain.accuracy,
        "parallel_equals_sequential": same,
        "num_parallel": parallel.tokens / parallel.critical_tokens,
        "malformed_answers": sum(bool(result.malformed) for result in parallel.results),
        **{f"tokens_per_answer_{mode}": answers[mode].tokens / len(problems) for mode in MODES},
        **{f"decode_steps_per_answer_{mode}": answers[mode].decode_steps / len(problems) for mode in MODES},
        "net_speedup_steps": sequential.decode_steps / parallel.decode_steps,
        "net_speedup_steps_over_autoregressive": plain.decode_steps / parallel.decode_steps,
        **{f"batch_seconds_{mode}": answers[mode].seconds for mode in MODES},
        "batch_threads": BATCH_THREADS,
    }


def answer_one_at_a_time(decoder: Decoder, problems: list[Problem]) -> list[dict[Mode, Answers]]:
    """Each problem on its own; the modes take turns, so that they meet the same machine."""
    return [{mode: decoder.answer([problem], mode) for mode in MODES} for problem in problems]


def measure_latency(alone: list[dict[Mode, Answers]]) -> Report:
    """Wall clock of one answer at a time."""
    seconds = {mode: sum(answers[mode].seconds for answers in alone) for mode in MODES}
    return {
        "latency_problems": len(alone),
        **{f"seconds_per_answer_{mode}": seconds[mode] / len(alone) for mode in MODES},
        "net_speedup_wall_clock": seconds["sequential"] / seconds["parallel"],
        "net_speedup_wall_clock_over_autoregressive": seconds["autoregressive"] / seconds["parallel"],
    }


def measure_logits(decoder: Decoder, problems: list[Problem]) -> Report:
    """Every decode step's logits against one teacher-forced forward pass."""
    worst, compared = decoder.logit_difference(problems)
    return {"max_abs_logit_difference": worst, "logit_rows_compared": compared}


def measure_larger_problems(decoder: Decoder, count: int, *, seed: int) -> Report:
    """Accuracy in parallel with more paths and with deeper nesting than `fresh_problems` has by default.

    Args:
        decoder: the model.
        count: problems of each of the three kinds.
        seed: other seeds give other problems.
    """
    kinds = {
        "6_expressions": fresh_problems(count, seed=seed, fewest=6, most=6),
        "8_expressions": fresh_problems(count, seed=seed, fewest=8, most=8),
        "depth_3": fresh_problems(count, seed=seed, most=3, max_depth=3),
    }
    # Each kind is a batch of its own: so few answers take one thread, and training on the other core keeps its own.
    found = {f"accuracy_{kind}": decoder.answer(problems, "parallel").accuracy for kind, problems in kinds.items()}
    return {"larger_problems": count, **found}


def draw_answer(problem: Problem, alone: Mapping[Mode, Answers], path: Path) -> None:
    """The branches of one answer over decode steps, and the same answer one branch at a time."""
    draw_timeline(
        alone["parallel"].results[0].timeline,
        path,
        sequential=alone["sequential"].results[0].timeline,
        labels=_outlines(render_parallel(problem)[1]),
        title="One answer, decoded in parallel branches",
    )


def _outlines(response: str) -> Mapping[str, str]:
    found: dict[str, str] = {}

    def walk(parts: tuple[str | Block, ...], prefix: str) -> None:
        for block in (part for part in parts if isinstance(part, Block)):
            for number, (outline, path) in enumerate(zip(block.outlines, block.paths, strict=True), start=1):
                found[f"{prefix}{number}"] = outline
                walk(path, f"{prefix}{number}.")

    walk(parse_text(response), "")
    return found
