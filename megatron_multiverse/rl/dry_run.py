"""What a run of reinforcement learning would do, and what it needs on each GPU, worked out without one.

Looked at are the config, the model's shape, its tokenizer, all prompts, what is asked of the engine for the longest,
the reward functions, and the step at which the run would go on; not the weights, what lies in the checkpoint it would
go on from, nor what the machine of the run must have installed (TransformerEngine, apex).

The trainer's part of the memory is that of `training/memory.py`; an engine, its cache and a reference model come on
top, and the output layer holds other logits. Two measured peaks of an update were 0.2 and 0.3 GiB above the estimate
(tests/unit/rl/test_dry_run.py).
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_multiverse.config import LayerConfig, ModelConfig, RLConfig, TrainConfig, pad_vocab_size
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.inference.step.forward import KVStore
from megatron_multiverse.inference.step.quantize import products_of
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.rl.drawing import drawing_of, engine_config
from megatron_multiverse.rl.loss import CHUNK
from megatron_multiverse.rl.prompts import Prompts
from megatron_multiverse.rl.rewards import Grader
from megatron_multiverse.rl.rollout import has_own_model, played_dtype
from megatron_multiverse.training.memory import Beside, Part, pretended_ranks, tokens_of
from megatron_multiverse.training.memory_report import advice_lines, counted, memory_lines, shape_to_try
from megatron_multiverse.training.run_folder import RunFolder
from megatron_multiverse.training.start import check_start, dtypes, weights_dtype
from megatron_multiverse.training.trackers import check_trackers
from megatron_multiverse.training.trainer import check_not_past


def report(config: RLConfig, published: str | None = None) -> str:
    """Look at a run and say what it would do.

    Args:
        config: the run; its number of ranks is WORLD_SIZE.
        published: name of a published shape, for a checkpoint that is not at hand. Prompts are then read only where
            `task.tokenizer_model` names a tokenizer.

    Raises:
        CheckpointError: the model is not at hand.
        ConfigError: settings that do not fit together, to the prompts or to the checkpoint in `checkpoint.save`; a
            reward cannot be found; the engine would refuse the longest prompt.
        DataError: the prompts cannot be read.
    """
    base = config.train_config()
    check_trackers(config.log)
    run = RunFolder(config.checkpoint)
    run.look()
    check_not_past(config, run)
    Grader(config.reward)
    model = shape_to_try(base, published, "policy.seq_length")
    base.parallel.check_model(model)
    about, longest = _prompts(config, base, model, published)
    parallel, policy, rollout = config.parallel, config.policy, config.rollout
    lines = [
        about,
        f"{config.train_iters} steps: each draws {rollout.prompts_per_step} x {rollout.group_size} answers of at most "
        f"{rollout.sampling.max_tokens} tokens and makes {policy.updates_per_step} update"
        f"{'s' * (policy.updates_per_step > 1)} of them, in rows of {policy.micro_batch_size} x {policy.seq_length} "
        "tokens",
        f"{counted(model.num_parameters)} parameters on {parallel.world_size} ranks: tensor "
        f"{parallel.tensor_model_parallel_size} x {parallel.data_parallel_size} replicas",
    ]
    lines += memory_lines(base, model, beside(config, model, longest))
    if not rollout.free_cache:
        freeing = dataclasses.replace(config, rollout=dataclasses.replace(rollout, free_cache=True))
        advice = advice_lines(base, model, beside(freeing, model, longest))
        lines += [f"with rollout.free_cache true, {line}" for line in advice if line not in lines]
    return "\n".join(lines)


def _prompts(config: RLConfig, base: TrainConfig, model: ModelConfig, published: str | None) -> tuple[str, int]:
    """What is said of the prompts, and the tokens of the longest one and its answer."""
    if published is not None and not config.task.tokenizer_model:
        told = f"{config.task.input}: not read, since only the shape of the model is here; task.tokenizer_model helps"
        return told, config.policy.seq_length
    tokenizer = build_tokenizer(config.task.tokenizer_type, config.tokenizer_model)
    if published is None:
        check_start(base, tokenizer, learns_from_answers=True)
    prompts = Prompts(config.task, tokenizer, config.seed)
    longest = drawing_of(config, model, tokenizer, prompts, config.parallel.data_parallel_size).longest
    return f"{config.task.input}: {len(prompts)} prompts, the longest of {prompts.longest} tokens", longest


def beside(config: RLConfig, model: ModelConfig, longest: int, targets: int | None = None) -> Beside:
    """What the run has on each GPU that supervised training has not.

    Args:
        config: the run.
        model: shape of the model.
        longest: tokens of the longest prompt and answer.
        targets: drawn tokens of a microbatch; default: all tokens of its rows, more than there can be.
    """
    base = config.train_config()
    engine = engine_config(config, longest, config.parallel.data_parallel_size)
    shape = dataclasses.replace(
        model, vocab_size=pad_vocab_size(model.vocab_size, config.parallel.tensor_model_parallel_size)
    )
    with pretended_ranks(config.parallel, 0), torch.device("meta"):
        layers = LayerConfig(transformer_impl="local")  # the weights of all kinds of layers
        part = build_gpt_model(shape, dtype=played_dtype(config), device="meta", initialize=False, layers=layers)
        store = KVStore.for_model(part, engine.num_pages, engine.page_size)
    width, count = played_dtype(config).itemsize, sum(parameter.numel() for parameter in part.parameters())
    parts = [Part("cache", [(2 * store.keys.numel(), width)], is_between=config.rollout.free_cache)]
    if has_own_model(config):
        rounded = scales = 0
        if engine.quantization != "none":
            weights = [product.weight for product in products_of(part)]
            rounded, scales = sum(weight.numel() for weight in weights), sum(len(weight) for weight in weights)
        sizes = [(count - rounded, width), (rounded, 1), (scales, 4)]
        parts.insert(0, Part("engine", [size for size in sizes if size[0]]))
    if config.policy.kl_coef:
        parts.append(Part("reference", [(count, weights_dtype(base).itemsize)]))
    return Beside(logits_of_targets(base, shape, tokens_of(base) if targets is None else targets), tuple(parts))


def logits_of_targets(config: TrainConfig, model: ModelConfig, targets: int) -> list[tuple[int, int]]:
    """What the output layer holds at its peak, as (elements, bytes of each).

    The backward pass has the logits of all targets and gradients of as many, chunk by chunk, and either three float32
    copies of a chunk's (themselves, their softmax, their gradient), or, at its end, the gradients once more in one
    piece.

    Args:
        config: the run.
        model: its shape, with the rows of the vocabulary that ranks pad.
        targets: drawn tokens of a microbatch.
    """
    width = dtypes(config)[1].itemsize
    rows = model.vocab_size // config.parallel.tensor_model_parallel_size
    chunk = 3 * min(targets, CHUNK) * model.vocab_size
    whole = targets * rows
    if chunk * max(4, width) > whole * width:
        return [(2 * whole, width), (chunk, max(4, width))]
    return [(3 * whole, width)]
