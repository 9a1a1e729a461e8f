"""What a model that is being trained answers by itself: the loss of given answers does not tell whether it forks well.

`pretrain_scripts/sft_multiverse.py` hands this to the training loop, which calls it at each validation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_multiverse.config import EngineConfig, SamplingParams, TrainConfig
from megatron_multiverse.data.sft_dataset import SFTDataset
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.step.model_ranks import ModelRanks
from megatron_multiverse.inference.step.runner import Runner
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.inference.text.result import BY_ENGINE, Result
from megatron_multiverse.model.mcore import parallel_state
from megatron_multiverse.parallel.ranks import current_ranks
from megatron_multiverse.training.engine import TrainEngine
from megatron_multiverse.training.metrics import MetricsWriter
from megatron_multiverse.training.start import describe_model

logger = logging.getLogger(__name__)


class FreeRunning:
    """Greedy answers to the first prompts of the validation set, always the same ones (`askable`). Changes no weight
    and no random generator.

    Ranks that hold one model between them (tensor parallel, pipeline stages) answer together. Data and context parallel
    ranks have whole models of their own and share the prompts out.

    Args:
        config: the run, with `eval_prompts` above 0.

    Raises:
        ConfigError: the tokenizer is not there, or no document of the validation set has a prompt that can be answered.
        DataError: the validation set is not there, or damaged.
    """

    def __init__(self, config: TrainConfig) -> None:
        data = config.data
        self._config, self._tokenizer = config, build_tokenizer(data.tokenizer_type, data.tokenizer_model)
        documents = SFTDataset(list(data.valid_prefixes), self._tokenizer.structure_vocab, malformed="causal")
        self._prompts = [documents.prompt(number) for number in askable(config, documents)]

    def __call__(self, engine: TrainEngine, step: int, metrics: MetricsWriter) -> None:
        """Answer every prompt; each answer is a line of metrics.jsonl, all together are one of the log.

        All ranks call it; the first one writes.
        """
        place = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        models = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        numbers = range(len(self._prompts))[place::models]
        with _for_decoding(engine.model) as model:
            answers = self._answers(model, [self._prompts[number] for number in numbers]) if numbers else []
        ranks = current_ranks()
        found = ranks.gather_to_first(list(zip(numbers, answers, strict=False)))  # ranks that follow have no answers
        if not ranks.is_first:
            return
        by_number = {number: result for pairs in found for number, result in pairs}
        results = [by_number[number] for number in sorted(by_number)]
        for number, result in enumerate(results):
            metrics.write("answer", step, **_record(number, result, self._tokenizer.detokenize))
        logger.info("step %d/%d | %s", step, self._config.train_iters, _summary(results))

    def _answers(self, model: Any, prompts: Sequence[list[int]]) -> list[Result]:
        """The answers, in order, on the first of the ranks that hold this model; nothing on those that follow it."""
        if not ModelRanks.current().is_first:
            runner = Runner(model, num_pages=0, page_size=0)
            runner.follow()
            runner.close()
            return []
        longest = max(map(len, prompts)) + self._config.eval_tokens
        sizes = EngineConfig(cuda_graphs=False)  # capturing them would take longer than so few answers
        engine = Engine(
            model,
            self._tokenizer.structure_vocab,
            dataclasses.replace(sizes, num_pages=sizes.pages_for(longest, len(prompts))),
            vocab_size=self._tokenizer.vocab_size,
            detokenize=self._tokenizer.detokenize,
        )
        ends = () if self._tokenizer.eod is None else (self._tokenizer.eod,)
        sampling = SamplingParams(temperature=0.0, max_tokens=self._config.eval_tokens, stop_token_ids=ends)
        try:
            return engine.generate([Request(prompt_ids=prompt, sampling=sampling) for prompt in prompts])
        finally:
            engine.close()


def askable(config: TrainConfig, documents: SFTDataset) -> list[int]:
    """The first documents of the validation set whose prompts the engine takes, `config.eval_prompts` of them or fewer.

    Documents of continued pretraining have no prompt, and one as long as the model's positions leaves no room for an
    answer. The engine refuses both, which would end the run at its first validation.

    Raises:
        ConfigError: there is none.
    """
    room = describe_model(config).max_sequence_length
    lengths = documents.prompt_lengths
    found = np.flatnonzero((lengths > 0) & (lengths < room))[: config.eval_prompts]
    if len(found) == 0:
        raise ConfigError(
            f"eval_prompts {config.eval_prompts} finds no prompt in data.valid_prefixes: of {len(lengths)} documents "
            f"{int((lengths == 0).sum())} have none, the prompts of the others leave no room in the model's {room} "
            "positions. Set it to 0, or name a validation set with a column for prompts"
        )
    passed_over = int(found[-1]) + 1 - len(found)
    if passed_over:
        logger.info("eval_prompts: %d documents without a prompt that can be answered are passed over", passed_over)
    return [int(number) for number in found]


@contextlib.contextmanager
def _for_decoding(model: Any) -> Iterator[Any]:
    """A model under training as an engine takes it: its weights multiply as they are, not in FP8, and steps of a few
    tokens are not cut up over tensor parallel ranks."""
    from megatron.core.transformer.utils import set_model_to_sequence_parallel

    fp8, sequence_parallel = model.config.fp8, model.config.sequence_parallel
    model.config.fp8 = None
    if sequence_parallel:
        set_model_to_sequence_parallel(model, False)
    try:
        yield model
    finally:
        model.config.fp8 = fp8
        if sequence_parallel:
            set_model_to_sequence_parallel(model, True)
        model.train()


def _record(number: int, result: Result, detokenize: Any) -> dict[str, Any]:
    return {
        "number": number,
        "prompt": detokenize(result.prompt_ids),
        "text": detokenize(result.token_ids),
        "finish_reason": result.finish_reason,
        "blocks": len(result.blocks),
        "tokens": len(result.token_ids),
        "critical_tokens": result.critical_tokens,
        "malformed": sum(count for code, count in result.malformed.items() if code not in BY_ENGINE),
    }


def _summary(results: list[Result]) -> str:
    tokens, critical = (
        sum(len(result.token_ids) for result in results),
        sum(result.critical_tokens for result in results),
    )
    ended = sum(result.finish_reason == "stop" for result in results)
    parallel = sum(bool(result.blocks) for result in results)
    wellformed = sum(not result.malformed.keys() - BY_ENGINE for result in results)
    return (
        f"{len(results)} free answers: {ended} ended by themselves, {wellformed} well-formed, {parallel} in parallel, "
        f"num_parallel {tokens / max(1, critical):.2f}"
    )
