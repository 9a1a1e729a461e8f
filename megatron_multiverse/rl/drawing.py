"""How the answers of a run are drawn: what is asked for each prompt, by an engine of which sizes.

It follows from the config, the shape of the model, its tokenizer and the prompts, so that what an engine would refuse
is refused before weights are loaded, and by a dry run too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_multiverse.config import ModelConfig, RLConfig, SamplingParams, pad_vocab_size
from megatron_multiverse.data.generation_config import end_ids
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import ConfigError, GenerationError
from megatron_multiverse.inference import EngineConfig, Request
from megatron_multiverse.inference.intake import Intake, count_ids
from megatron_multiverse.rl.prompts import Prompts


@dataclass(frozen=True)
class Drawing:
    """What is asked of the engine of each replica."""

    sampling: SamplingParams
    """Of the answers to each prompt, but for their noise: as many as a group has, with all tokens that end them."""
    engine: EngineConfig
    """With the number of its pages."""
    longest: int
    """Tokens of the longest prompt and answer."""


def drawing_of(
    config: RLConfig, model: ModelConfig, tokenizer: MultiverseTokenizer, prompts: Prompts, replicas: int
) -> Drawing:
    """How the answers of a run are drawn.

    Args:
        config: the run.
        model: shape of the model.
        tokenizer: of the model.
        prompts: what is asked.
        replicas: of the model.

    Raises:
        ConfigError: the longest prompt and answer do not fit into a row or into the cache; the engine refuses what is
            asked of it; generation_config.json of the model is damaged.
    """
    longest = check_length(config, prompts.longest)
    sampling = config.rollout.sampling
    # The end tokens that generation_config.json names end answers too, as they do where the model is served.
    stops = (*sampling.stop_token_ids, *end_ids(Path(config.init_from), tokenizer))
    sampling = dataclasses.replace(sampling, n=config.rollout.group_size, stop_token_ids=stops)
    drawing = Drawing(sampling, engine_config(config, longest, replicas), longest)
    rows = pad_vocab_size(model.vocab_size, config.parallel.tensor_model_parallel_size)
    try:
        intake = Intake(
            tokenizer.structure_vocab,
            drawing.engine,
            num_pages=drawing.engine.num_pages,
            max_position=model.max_sequence_length,
            num_ids=count_ids(tokenizer.vocab_size, rows),
            detokenize=tokenizer.detokenize,
        )
        # The prompts differ in nothing but their length that the engine looks at: their ids are the tokenizer's.
        intake.check(Request(prompt_ids=prompts.longest_ids, sampling=sampling))
    except GenerationError as error:
        raise ConfigError(
            f"rollout: the engine would refuse the longest prompt of {config.task.input}: {error}"
        ) from error
    return drawing


def check_length(config: RLConfig, longest_prompt: int) -> int:
    """Tokens of the longest prompt and answer together.

    Raises:
        ConfigError: they do not fit into a row, which is no longer than the positions of the model.
    """
    longest, room = longest_prompt + config.rollout.sampling.max_tokens, config.policy.seq_length
    if longest > room:
        raise ConfigError(
            f"the longest prompt ({longest_prompt} tokens) and rollout.sampling.max_tokens "
            f"({config.rollout.sampling.max_tokens}) are {longest} tokens, more than policy.seq_length {room}: lower "
            "max_tokens or raise policy.seq_length"
        )
    return longest


def engine_config(config: RLConfig, longest: int, replicas: int) -> EngineConfig:
    """The sizes of a replica's engine, with pages for all answers that run at once where the run leaves them open."""
    engine, rollout = config.rollout.engine, config.rollout
    if engine.num_pages:
        return engine
    at_once = min(-(-rollout.prompts_per_step // replicas) * rollout.group_size, engine.max_rows)
    return dataclasses.replace(engine, num_pages=engine.pages_for(longest, at_once))
