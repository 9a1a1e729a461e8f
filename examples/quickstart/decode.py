"""Decoding problems with a trained model: in parallel, one branch at a time, or as plain sequential thinking."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from task import Problem, check_answer, render_autoregressive, render_parallel
from torch import Tensor

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.inference import CounterSampler, Engine, Request, Result, SamplingArrays, TokenCallback
from megatron_multiverse.inference.text.branch import branch_key
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.structure import lay_out, parse

MAX_TOKENS = 3800
Mode = Literal["parallel", "sequential", "autoregressive"]
"""sequential: the text of parallel, one branch at a time. autoregressive: asked to think without blocks."""


@dataclass(frozen=True)
class Answers:
    """What the model said to some problems, and what it cost."""

    results: list[Result]
    correct: list[bool]
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of problems whose every result is right."""
        return sum(self.correct) / len(self.correct)

    @property
    def tokens(self) -> int:
        """Tokens written, all branches together."""
        return sum(len(result.token_ids) for result in self.results)

    @property
    def critical_tokens(self) -> int:
        """Tokens on the longest chains."""
        return sum(result.critical_tokens for result in self.results)

    @property
    def decode_steps(self) -> int:
        """Forward passes each answer took, added up."""
        return sum(result.decode_steps for result in self.results)


class RecordingSampler:
    """Greedy decoding that keeps the logits of every step on demand."""

    def __init__(self) -> None:
        self.recording = False
        self.logits: dict[tuple[int, int], Tensor] = {}
        """(key of a branch, index among the tokens it drew) -> logits [vocab]."""
        self._choose = CounterSampler()

    def __call__(self, logits: Tensor, sampling: SamplingArrays) -> tuple[Tensor, Tensor]:
        """See `inference.Sampler`."""
        if self.recording:
            for row, *drawn in zip(logits, sampling.keys.tolist(), sampling.indices.tolist(), strict=True):
                self.logits[drawn[0], drawn[1]] = row.clone()
        return self._choose(logits, sampling)


class Decoder:
    """The model in `folder` with an engine around it, on the CPU unless told otherwise."""

    def __init__(self, folder: Path, *, device: str = "cpu", max_rows: int = 64, num_pages: int = 8192) -> None:
        self.tokenizer = build_tokenizer("HuggingFaceTokenizer", str(folder))
        model, self.config = load_checkpoint(folder, device=device)
        self.model = model.eval()
        self.device = device
        self.sampler = RecordingSampler()
        self.engine = Engine(
            self.model,
            self.tokenizer.structure_vocab,
            EngineConfig(num_pages=num_pages, max_rows=max_rows),
            sampler=self.sampler,
        )

    def prompt_ids(self, problem: Problem, mode: Mode) -> list[int]:
        """Tokens of the prompt that asks for this mode."""
        render = render_autoregressive if mode == "autoregressive" else render_parallel
        return self.tokenizer.tokenize(render(problem)[0])

    def answer(self, problems: Sequence[Problem], mode: Mode, *, on_token: TokenCallback | None = None) -> Answers:
        """Decode all problems together, greedily."""
        sampling = SamplingParams(max_tokens=MAX_TOKENS, max_concurrent_branches=1 if mode == "sequential" else None)
        requests = [
            Request(prompt_ids=self.prompt_ids(problem, mode), sampling=sampling, sample=number)
            for number, problem in enumerate(problems)
        ]
        start = time.perf_counter()
        results = self.engine.generate(requests, on_token=on_token)
        seconds = time.perf_counter() - start
        texts = [self.tokenizer.detokenize(result.token_ids) for result in results]
        return Answers(results, [check_answer(*pair) for pair in zip(problems, texts, strict=True)], seconds)

    def logit_difference(self, problems: Sequence[Problem]) -> tuple[float, int]:
        """Compare parallel decoding with one teacher-forced forward pass over the same tokens.

        Returns:
            Largest absolute difference of a logit, and the number of decode-step rows compared (all of them).
        """
        self.sampler.logits.clear()
        self.sampler.recording = True
        try:
            results = self.answer(problems, "parallel").results
        finally:
            self.sampler.recording = False
        worst = max(self._difference(number, result) for number, result in enumerate(results))
        compared = len(self.sampler.logits)
        self.sampler.logits.clear()
        return worst, compared

    @torch.inference_mode()
    def _difference(self, number: int, result: Result) -> float:
        """Largest difference over the tokens of answer `number`."""
        prompt, ids = len(result.prompt_ids), [*result.prompt_ids, *result.token_ids]
        layout = lay_out(parse(ids, self.tokenizer.structure_vocab, prompt_length=prompt, strict=False))
        positions = torch.from_numpy(layout.position_ids).long()
        if positions[prompt:].tolist() != result.position_ids or layout.r[prompt:].tolist() != result.labels:
            raise RuntimeError("the engine and the layout disagree about positions or labels; this is a bug")
        forward = self.model(
            torch.tensor([ids], device=self.device),
            positions[None].to(self.device),
            None,
            packed_seq_params=LayoutParams.from_labels(torch.from_numpy(layout.r)[None].to(self.device)),
        )[0]
        worst = 0.0
        for drawn, parent in drawn_from(number, result).items():
            difference = forward[prompt + parent] - self.sampler.logits[drawn]
            worst = max(worst, float(difference.abs().max()))
        return worst


def drawn_from(number: int, result: Result) -> dict[tuple[int, int], int]:
    """(key of a branch, index among the tokens it drew) -> index in the answer of the token it was drawn from.

    Args:
        number: `sample` of the request.
        result: its answer.
    """
    paths: list[tuple[tuple[int, int], ...]] = [()] * len(result.token_ids)
    for block in result.blocks:  # outer blocks come before the blocks inside them
        for branch in block.branches:
            paths[branch.start : branch.end] = [branch.path] * (branch.end - branch.start)
    keys = {path: branch_key(0, number, path) for path in {(), *paths}}
    table: dict[tuple[int, int], int] = {}
    count: Counter[int] = Counter()
    for path, is_sampled, parent in zip(paths, result.sampled, result.parents, strict=True):
        if is_sampled:
            table[keys[path], count[keys[path]]] = parent
            count[keys[path]] += 1
    if result.finish_reason == "stop":  # the end of the text was drawn, too, but is not part of the answer
        table[keys[()], count[keys[()]]] = len(result.token_ids) - 1
    return table
