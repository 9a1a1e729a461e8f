"""Decoding problems with a trained model: in parallel, one branch at a time, or as plain sequential thinking."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from task import Problem, check_answer, render_autoregressive, render_parallel
from torch import Tensor

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.inference import CounterSampler, Engine, Request, Result
from megatron_multiverse.inference.branch import Branch
from megatron_multiverse.inference.request_state import TokenCallback
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.structure import lay_out, parse
from megatron_multiverse.views.sample_view import stretches

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
        self.logits: dict[tuple[int, str, int], Tensor] = {}
        """(request, branch, position of the token they chose) -> logits [vocab]."""
        self._choose = CounterSampler()

    def __call__(self, logits: Tensor, branches: Sequence[Branch]) -> Tensor:
        """See `inference.sampler.Sampler`."""
        if self.recording:
            for row, branch in zip(logits, branches, strict=True):
                self.logits[branch.request.request_id, branch.name, branch.next_position] = row.clone()
        return self._choose(logits, branches)


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
            num_pages=num_pages,
            max_rows=max_rows,
            sampler=self.sampler,
        )

    def prompt_ids(self, problem: Problem, mode: Mode) -> list[int]:
        """Tokens of the prompt that asks for this mode."""
        render = render_autoregressive if mode == "autoregressive" else render_parallel
        return self.tokenizer.tokenize(render(problem)[0])

    def answer(self, problems: Sequence[Problem], mode: Mode, *, on_token: TokenCallback | None = None) -> Answers:
        """Decode all problems together, greedily."""
        requests = [
            Request(
                prompt_ids=self.prompt_ids(problem, mode),
                max_tokens=MAX_TOKENS,
                max_concurrent_branches=1 if mode == "sequential" else None,
            )
            for problem in problems
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
        pairs = zip(problems, results, strict=True)
        worst = max(self._difference(self.prompt_ids(problem, "parallel"), result) for problem, result in pairs)
        compared = len(self.sampler.logits)
        self.sampler.logits.clear()
        return worst, compared

    @torch.inference_mode()
    def _difference(self, prompt: list[int], result: Result) -> float:
        ids = [*prompt, *result.token_ids]
        document = parse(ids, self.tokenizer.structure_vocab, prompt_length=len(prompt), strict=False)
        layout = lay_out(document)
        positions = layout.position_ids
        if positions[len(prompt) :].tolist() != result.position_ids:
            raise RuntimeError("the engine and the layout disagree about positions; this is a bug")
        r = torch.from_numpy(layout.r)[None].to(self.device)
        forward = self.model(
            torch.tensor([ids], device=self.device),
            torch.from_numpy(positions).long()[None].to(self.device),
            None,
            packed_seq_params=LayoutParams.from_labels(r),
        )[0]
        index = {
            (stretch.branch, int(positions[i])): i
            for stretch in stretches(document)
            for i in range(stretch.start, stretch.end)
        }
        index["", int(positions[-1]) + 1] = len(ids)  # the end-of-text token, which is not part of the answer
        worst = 0.0
        for (request, branch, position), logits in self.sampler.logits.items():
            if request == result.request_id:
                predicted = forward[index[branch, position] - 1]
                worst = max(worst, float((predicted - logits).abs().max()))
        return worst
