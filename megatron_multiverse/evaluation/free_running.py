"""What a model that is being trained answers by itself: the loss of given answers does not tell whether it forks well.

`pretrain_scripts/sft_multiverse.py` hands this to the training loop, which calls it at each validation.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from megatron_multiverse.config import EngineConfig, SamplingParams, TrainConfig
from megatron_multiverse.data.sft_dataset import SFTDataset
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.training.engine import TrainEngine
from megatron_multiverse.training.metrics import MetricsWriter

logger = logging.getLogger(__name__)


class FreeRunning:
    """Greedy answers to the first prompts of the validation set, always the same ones. Changes no weight and no random
    generator.

    Args:
        config: the run, with `eval_prompts` above 0; it runs on one rank.

    Raises:
        ConfigError: the tokenizer is not there.
        DataError: the validation set is not there, or damaged.
    """

    def __init__(self, config: TrainConfig) -> None:
        data = config.data
        self._config, self._tokenizer = config, build_tokenizer(data.tokenizer_type, data.tokenizer_model)
        documents = SFTDataset(list(data.valid_prefixes), self._tokenizer.structure_vocab, malformed="causal")
        self._prompts = [documents.prompt(number) for number in range(min(config.eval_prompts, len(documents)))]

    def __call__(self, engine: TrainEngine, step: int, metrics: MetricsWriter) -> None:
        """Answer every prompt; each answer is a line of metrics.jsonl, all together are one of the log."""
        model: Any = engine.model  # type: ignore[attr-defined]  # of OneProcessEngine; TrainConfig allows no other
        try:
            results = self._answers(model)
        finally:
            model.train()
        for number, result in enumerate(results):
            metrics.write("answer", step, **_record(number, result, self._tokenizer.detokenize))
        logger.info("step %d/%d | %s", step, self._config.train_iters, _summary(results))

    def _answers(self, model: Any) -> list[Result]:
        longest = max(map(len, self._prompts)) + self._config.eval_tokens
        sizes = EngineConfig(cuda_graphs=False)  # capturing them would take longer than so few answers
        pages = len(self._prompts) * (-(-longest // sizes.page_size) + sizes.page_size)
        engine = Engine(
            model,
            self._tokenizer.structure_vocab,
            dataclasses.replace(sizes, num_pages=pages),
            vocab_size=self._tokenizer.vocab_size,
            detokenize=self._tokenizer.detokenize,
        )
        ends = () if self._tokenizer.eod is None else (self._tokenizer.eod,)
        sampling = SamplingParams(temperature=0.0, max_tokens=self._config.eval_tokens, stop_token_ids=ends)
        try:
            return engine.generate([Request(prompt_ids=prompt, sampling=sampling) for prompt in self._prompts])
        finally:
            engine.close()


def _record(number: int, result: Result, detokenize: Any) -> dict[str, Any]:
    return {
        "number": number,
        "prompt": detokenize(result.prompt_ids),
        "text": detokenize(result.token_ids),
        "finish_reason": result.finish_reason,
        "blocks": len(result.blocks),
        "tokens": len(result.token_ids),
        "critical_tokens": result.critical_tokens,
        "malformed": sum(result.malformed.values()),
    }


def _summary(results: list[Result]) -> str:
    tokens, critical = (
        sum(len(result.token_ids) for result in results),
        sum(result.critical_tokens for result in results),
    )
    ended = sum(result.finish_reason == "stop" for result in results)
    parallel = sum(bool(result.blocks) for result in results)
    wellformed = sum(not result.malformed for result in results)
    return (
        f"{len(results)} free answers: {ended} ended by themselves, {wellformed} well-formed, {parallel} in parallel, "
        f"num_parallel {tokens / max(1, critical):.2f}"
    )
