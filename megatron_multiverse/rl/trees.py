"""Answers as training rows: the answers to a prompt as one tree of tokens, trees packed into rows of equal length.

A tree is the prompt, then its answers one after the other, each a path of one block that never joins
(`structure.share_prefix`): the prompt is computed once, and every token has the position and sees the tokens that it
had and saw when it was drawn. What is trained is a list of *targets*: a token that the model drew, at the index of the
token that it was drawn after. Several targets may stand at one index, as the first tokens of all answers do at the last
of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_multiverse.data.packing import pack
from megatron_multiverse.data.sft_dataset import Sample, pack_arrays
from megatron_multiverse.inference import Result, training_row
from megatron_multiverse.structure import StructureVocab, share_prefix
from megatron_multiverse.training.microbatches import Microbatch


@dataclass(frozen=True)
class Targets:
    """What the model drew, in the order of the text; arrays of one length T."""

    contexts: npt.NDArray[np.int64]
    """Index of the token that each was drawn after."""
    tokens: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float64]
    """Log-probability of each when it was drawn."""
    advantages: npt.NDArray[np.float64]
    """Of the answer that each is part of."""


_NO_TARGETS = Targets(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))


@dataclass(frozen=True)
class Tree:
    """One prompt and some of its answers."""

    sample: Sample
    targets: Targets


def answer_tree(
    result: Result,
    advantage: float,
    vocab: StructureVocab,
    *,
    max_depth: int | None = None,
    max_paths: int | None = None,
) -> Tree:
    """A prompt with one answer; see `inference.training_row`, which checks that it is laid out as it was drawn."""
    row = training_row(result, vocab, max_depth=max_depth, max_paths=max_paths)
    prompt = len(result.prompt_ids)
    drawn = np.flatnonzero(result.sampled)
    ends = result.ends
    contexts = [*(result.parents[index] for index in drawn), *(end.parent for end in ends)]
    targets = Targets(
        prompt + np.array(contexts, dtype=np.int64),
        np.array([*(result.token_ids[index] for index in drawn), *(end.token for end in ends)], dtype=np.int64),
        np.concatenate((row.logprobs[prompt + drawn], np.array([end.logprob for end in ends], dtype=np.float64))),
        np.full(len(contexts), advantage),
    )
    return Tree(row.sample, targets)


def join_trees(trees: Sequence[Tree], prompt: int, seq_length: int) -> list[Tree]:
    """The trees of one prompt joined into as few as fit into rows, so that its tokens stand there once each.

    Args:
        trees: each with the same first `prompt` tokens.
        prompt: tokens of the prompt.
        seq_length: most tokens of a joined tree; a single one may be longer.
    """
    joined: list[Tree] = []
    waiting: list[Tree] = []
    room = 0
    for tree in trees:
        rest = len(tree.sample.ids) - prompt
        if waiting and rest > room:
            joined.append(_join(waiting, prompt))
            waiting = []
        room = (room if waiting else seq_length - prompt) - rest
        waiting.append(tree)
    return [*joined, _join(waiting, prompt)] if waiting else joined


def _join(trees: Sequence[Tree], prompt: int) -> Tree:
    shifts = np.cumsum([0, *(len(tree.sample.ids) - prompt for tree in trees)])
    ids = np.concatenate([trees[0].sample.ids[:prompt], *(tree.sample.ids[prompt:] for tree in trees)])
    contexts = [
        tree.targets.contexts + np.where(tree.targets.contexts < prompt, 0, shift)
        for tree, shift in zip(trees, shifts, strict=False)
    ]
    layout = share_prefix([tree.sample.layout for tree in trees], prompt)
    return Tree(Sample(ids, layout), _concatenate([tree.targets for tree in trees], contexts))


def _concatenate(parts: Sequence[Targets], contexts: Sequence[npt.NDArray[np.int64]]) -> Targets:
    return Targets(
        np.concatenate(contexts),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.advantages for part in parts]),
    )


def microbatches(
    trees: Sequence[Tree], seq_length: int, micro_batch_size: int, pad: int, *, seed: int, step: int
) -> list[Microbatch]:
    """Trees packed into rows, rows into microbatches.

    Args:
        trees: none longer than `seq_length`. Without any there is one row of padding, so that a rank which has nothing
            to train can take part in the step of the others.
        seq_length: s, tokens per row.
        micro_batch_size: b, rows per microbatch; the last one may have fewer.
        pad: token id of the padding.
        seed: of the run; with `step` it decides how trees are packed.
        step: see `seed`.

    Returns:
        For `training.engine.TrainEngine.step` with `loss.PolicyLoss`: ``input_ids``, ``position_ids``, ``r`` [b, s];
        ``contexts`` int64 [T], indices into the b x s tokens, ``targets`` int64 [T], ``old_logprobs`` and
        ``advantages`` float64 [T], and ``loss_mask``, T ones.

    Raises:
        DataError: a tree is longer than a row.
    """
    lengths = np.array([len(tree.sample.ids) for tree in trees], dtype=np.int64)
    packs = pack(lengths, seq_length, seed=seed, epoch=step).packs if trees else [[]]
    return [
        _microbatch([[trees[k] for k in row] for row in packs[start : start + micro_batch_size]], seq_length, pad)
        for start in range(0, len(packs), micro_batch_size)
    ]


def _microbatch(rows: Sequence[Sequence[Tree]], seq_length: int, pad: int) -> Microbatch:
    arrays = [pack_arrays([tree.sample for tree in row], seq_length, pad) for row in rows]
    parts, contexts = [_NO_TARGETS], [_NO_TARGETS.contexts]
    for number, row in enumerate(rows):
        start = number * seq_length
        for tree in row:
            parts.append(tree.targets)
            contexts.append(tree.targets.contexts + start)
            start += len(tree.sample.ids)
    targets = _concatenate(parts, contexts)
    values: dict[str, npt.NDArray[Any]] = {
        **{name: np.stack([array[name] for array in arrays]) for name in ("input_ids", "position_ids", "r")},
        "contexts": targets.contexts,
        "targets": targets.tokens,
        "old_logprobs": targets.logprobs,
        "advantages": targets.advantages,
        "loss_mask": np.ones(len(targets.tokens), dtype=np.float32),
    }
    return {name: torch.from_numpy(value) for name, value in values.items()}
