"""What the example's models do with held-out problems: right answers, forks, steps and seconds of one answer at a time.

Every model answers the same problems, one at a time, drawing from its own distribution as in training, and the models
take turns. Net speedup is the wall clock per right answer of the first model divided by that of another.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import DType, EngineConfig, SamplingParams
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.dtypes import DTYPES
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.grading import stated_answer
from megatron_multiverse.inference import Request, build_engine
from megatron_multiverse.model.device import choose_device

WARM_UP = 20
"""The most answers before any is timed: kernels are compiled, and graphs of the usual numbers of branches recorded."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Which models, on which problems."""

    models: list[Path]
    """Model folders; the first one is what the others are compared with."""
    input: Path
    """held_out.jsonl of examples/rl/rows.py."""
    output: Path
    """JSON file to write."""
    num_problems: int = 100
    """The first so many problems."""
    max_tokens: int = 1400
    """Of an answer."""
    temperature: float = 1.0
    """0 takes the most likely tokens, which hides how often a model splits by chance."""
    dtype: DType = "bf16"
    """Of weights and cache."""
    device: str = "auto"
    """auto takes CUDA when there is a GPU."""


def answer_all(options: CompareOptions) -> dict[str, list[dict[str, Any]]]:
    """What each model did with each problem."""
    with open(options.input, encoding="utf-8") as file:
        problems = [json.loads(line) for line in file][: options.num_problems]
    engines, tokenizers = {}, {}
    for folder in options.models:
        tokenizers[folder] = build_tokenizer("HuggingFaceTokenizer", folder)
        engines[folder] = build_engine(
            folder,
            tokenizers[folder],
            EngineConfig(),
            longest=options.max_tokens + 200,
            dtype=DTYPES[options.dtype],
            device=choose_device(options.device),
        )
    rows: dict[str, list[dict[str, Any]]] = {str(folder): [] for folder in options.models}
    warm_up = problems[:WARM_UP]
    for number, problem in enumerate([*warm_up, *problems]):
        sampling = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature, seed=number)
        for folder, engine in engines.items():
            ids = tokenizers[folder].tokenize(problem["prompt"])
            started = time.perf_counter()
            (result,) = engine.generate([Request(prompt_ids=ids, sampling=sampling)])
            seconds = time.perf_counter() - started
            stated = stated_answer(tokenizers[folder].detokenize(result.token_ids)) or ""
            if number >= len(warm_up):
                rows[str(folder)].append(
                    {
                        "family": problem["family"],
                        "right": stated.split() == problem["answer"].split(),
                        "blocks": len(result.blocks),
                        "tokens": len(result.token_ids),
                        "steps": result.decode_steps,
                        "seconds": seconds,
                    }
                )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over some answers."""
    count, right = len(rows), sum(row["right"] for row in rows)
    return {
        "answers": count,
        "accuracy": right / count,
        "forks": sum(row["blocks"] > 0 for row in rows) / count,
        "blocks": sum(row["blocks"] for row in rows) / count,
        "tokens": sum(row["tokens"] for row in rows) / count,
        "steps": sum(row["steps"] for row in rows) / count,
        "seconds_per_right_answer": sum(row["seconds"] for row in rows) / max(1, right),
    }


def main() -> None:
    options = parse_options(CompareOptions)
    report: dict[str, Any] = {
        "num_problems": options.num_problems,
        "dtype": options.dtype,
        "temperature": options.temperature,
    }
    report["models"] = {}
    for name, rows in answer_all(options).items():
        families = sorted({row["family"] for row in rows})
        by_family = {family: summary([row for row in rows if row["family"] == family]) for family in families}
        report["models"][name] = {**summary(rows), "by_family": by_family}
    first = report["models"][str(options.models[0])]
    print(f"{'model':<28}{'family':>10}{'right':>8}{'forks':>8}{'blocks':>8}{'tokens':>8}{'steps':>8}{'ms/right':>10}")
    for name, values in report["models"].items():
        if first["accuracy"] and values["accuracy"]:
            values["net_speedup"] = first["seconds_per_right_answer"] / values["seconds_per_right_answer"]
            values["net_speedup_steps"] = (first["steps"] / first["accuracy"]) / (values["steps"] / values["accuracy"])
        for family, row in {"all": values, **values["by_family"]}.items():
            print(
                f"{name[-26:]:<28}{family:>10}{row['accuracy']:>8.1%}{row['forks']:>8.1%}{row['blocks']:>8.2f}"
                f"{row['tokens']:>8.0f}{row['steps']:>8.0f}{1000 * row['seconds_per_right_answer']:>10.1f}"
            )
        if "net_speedup" in values:
            clock, steps = values["net_speedup"], values["net_speedup_steps"]
            print(f"{'':<28}net speedup {clock:.2f} in wall clock, {steps:.2f} in steps")
        else:
            print(f"{'':<28}no net speedup: one of the two has no right answer")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(options.output, report)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run_tool(main)
