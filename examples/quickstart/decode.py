"""Decoding problems with a trained model: in parallel, one branch at a time, or as plain sequential thinking."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from task import Problem, check_answer, render_autoregressive, render_parallel
from torch import Tensor

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.config.choices import Quantization
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.inference import (
    CounterSampler,
    Engine,
    Request,
    Result,
    SamplingArrays,
    TokenCallback,
    drawn_from,
)
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.structure import lay_out, parse

MAX_TOKENS = 3800
"""Above the longest answer of 10,000 problems with 8 expressions (2,716) or of depth 3 (2,104)."""
BATCH_THREADS = min(2, os.cpu_count() or 1)
"""Threads for many answers at once: their matrices are large enough for a second one."""
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

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        max_rows: int = 512,
        num_pages: int = 8192,
        quantization: Quantization = "none",
    ) -> None:
        self.tokenizer = build_tokenizer("HuggingFaceTokenizer", str(folder))
        model, self.config = load_checkpoint(folder, device=device)
        self.model = model.eval()
        self.device = device
        self.sampler = RecordingSampler()
        self.engine = Engine(
            self.model,
            self.tokenizer.structure_vocab,
            EngineConfig(num_pages=num_pages, max_rows=max_rows, quantization=quantization),
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
        threads = torch.get_num_threads()
        torch.set_num_threads(threads if len(problems) < 16 else max(threads, BATCH_THREADS))
        start = time.perf_counter()
        try:
            results = self.engine.generate(requests, on_token=on_token)
        finally:
            torch.set_num_threads(threads)
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
        recorded = len(self.sampler.logits)
        worst = max(self._difference(number, result) for number, result in enumerate(results))
        if self.sampler.logits:
            raise RuntimeError(f"{len(self.sampler.logits)} draws belong to no token of the answers; this is a bug")
        return worst, recorded

    @torch.inference_mode()
    def _difference(self, number: int, result: Result) -> float:
        """Largest difference over the tokens of answer `number`, whose logits are taken out."""
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
        for drawn, parent in drawn_from(result, sample=number).items():
            if (logits := self.sampler.logits.pop(drawn, None)) is not None:
                worst = max(worst, float((forward[prompt + parent] - logits).abs().max()))
        return worst
