"""vLLM's side of `benchmarks.beside_vllm`: runs with vLLM's packages, and nothing of this project but its worker.

vLLM has no fork and no join. A block is the same work as its users do it: one request per path, all over a prefix that
its prefix cache holds, then one request for the conclusion, whose prompt is the prefix and all paths as they were
written. Of that prompt it finds the prefix and the first path in its cache, and reads the others again.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.beside_vllm.worker import Measure, serve, step_figures

OWN = 8
"""Tokens of each path's own that its request brings after the prefix: paths are not the same."""


class Client:
    """Drives vLLM's engine with ids, all answers streamed.

    Args:
        setup: `config` for a config.json in `folder`, `options` of `vllm.LLM`.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        import vllm

        folder = Path(setup["folder"])  # among what the run keeps: the process is killed, and clears nothing away
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(setup["config"]), encoding="utf-8")
        options = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "generation_config": "vllm",
        }
        self.engine = vllm.LLM(model=str(folder), **options, **setup["options"]).llm_engine
        self.version: str = vllm.__version__
        self.rng = random.Random(0)
        self.vocab_size: int = setup["config"]["vocab_size"]
        self.prefixes: dict[int, list[int]] = {}
        self.requests = 0

    def tokens(self, count: int) -> list[int]:
        """Random ids."""
        return [self.rng.randrange(self.vocab_size) for _ in range(count)]

    def prefix(self, length: int) -> list[int]:
        """The same ids for the same length, in the prefix cache."""
        if length not in self.prefixes:
            self.prefixes[length] = self.tokens(length)
        self.drive([self.prefixes[length]], 1)
        return self.prefixes[length]

    def drive(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[float], float]:
        """Greedy answers of so many tokens each.

        Returns:
            The answers, the seconds between two outputs that both hold a token of every answer (none of them the
            first), and those until the last answer has begun.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        start = time.perf_counter()
        answers: dict[str, list[int]] = {}
        for prompt in prompts:
            self.requests += 1
            answers[str(self.requests)] = []
            self.engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, sampling)
        steps: list[float] = []
        begun, last, last_full = 0.0, start, False
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter()
            got = [(answers[output.request_id], output.outputs[0].token_ids) for output in outputs]
            got = [(answer, ids) for answer, ids in got if len(ids)]
            if not got:
                continue
            first = any(not answer for answer, _ in got)
            full = len(got) == len(prompts) and all(len(ids) == 1 for _, ids in got)
            if full and last_full and not first:
                steps.append(now - last)
            if first:
                begun = now - start
            for answer, ids in got:
                answer.extend(ids)
            last, last_full = now, full
        assert all(len(answer) == new_tokens for answer in answers.values()), "an answer has another length"
        return list(answers.values()), steps, begun

    def block(self, case: dict[str, Any]) -> dict[str, Any]:
        """`paths` requests of `tokens` over a cached prefix, then one that reads all of them for the conclusion."""
        prefix = self.prefix(case["prefix"])
        own = [self.tokens(OWN) for _ in range(case["paths"])]
        start = time.perf_counter()
        written, steps, begun = self.drive([prefix + ids for ids in own], case["tokens"])
        paths = time.perf_counter() - start
        texts = [ids + answer for ids, answer in zip(own, written, strict=True)]
        _, _, joined = self.drive([prefix + [token for text in texts for token in text]], case["conclusion"])
        seconds = time.perf_counter() - start
        parts = {
            "seconds": seconds,
            "paths_seconds": paths,
            "begun_seconds": begun,
            "join_to_first_token_seconds": joined,
        }
        return {**step_figures(steps), **{name: round(value, 4) for name, value in parts.items()}}

    def decode(self, case: dict[str, Any]) -> dict[str, Any]:
        """`batch` requests with prompts of their own write text."""
        start = time.perf_counter()
        _, steps, begun = self.drive([self.tokens(length) for length in case["lengths"]], case["tokens"])
        seconds = time.perf_counter() - start
        return {**step_figures(steps), "seconds": round(seconds, 4), "begun_seconds": round(begun, 4)}

    def measure(self, case: dict[str, Any]) -> dict[str, Any]:
        """Figures of a case."""
        return self.block(case) if case["kind"] == "block" else self.decode(case)


def begin(setup: dict[str, Any]) -> tuple[Measure, dict[str, Any]]:
    """Start vLLM."""
    client = Client(setup)
    return client.measure, {"vllm": client.version}


if __name__ == "__main__":
    serve(begin)
