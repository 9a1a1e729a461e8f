"""What a model of random weights is made to write for a measurement: one block of equal paths."""

from __future__ import annotations

from itertools import takewhile

import torch
from torch import Tensor

from megatron_multiverse.inference.step.plan import SamplingArrays
from megatron_multiverse.inference.text.branch import BranchPath, branch_key
from megatron_multiverse.kernels.sampling import greedy, token_logprobs
from megatron_multiverse.structure import TAGS, StructureVocab, Tag

PIECES = [*TAGS, "\n", *"0123456789", ".", ":"]
NEWLINE, DIGITS, COLON, TEXT = len(TAGS), len(TAGS) + 1, len(PIECES) - 1, len(PIECES) + 1
VOCAB = StructureVocab.from_pieces(PIECES, eos_id=len(PIECES))
CONCLUSION = 64
"""Tokens of the conclusion."""


def block_script(branches: int, tokens: int) -> dict[int, list[int]]:
    """What each branch writes, by the key of its noise: one block of equal paths, then a conclusion and the end."""
    words = [TEXT + index % 400 for index in range(max(tokens, CONCLUSION))]
    root = [*block_header(branches), *words[:CONCLUSION], Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL, TEXT]
    scripts: dict[BranchPath, list[int]] = {(): [*root, len(PIECES)]}
    scripts |= {((0, path),): [*words[: tokens - 1], NEWLINE, Tag.END_PATH] for path in range(branches)}
    return {branch_key(0, 0, path): [int(token) for token in ids] for path, ids in scripts.items()}


def block_header(branches: int) -> list[int]:
    """From `<Parallel>` to `</Goal>`, with so many outlines."""
    ids = [Tag.PARALLEL, NEWLINE, Tag.GOAL]
    for path in range(branches):
        ids += [NEWLINE, Tag.OUTLINE, NEWLINE, *_label(path), TEXT, Tag.END_OUTLINE]
    return [int(token) for token in (*ids, NEWLINE, Tag.END_GOAL)]


def _label(path: int) -> list[int]:
    return [*(DIGITS + int(digit) for digit in str(path + 1)), COLON]


def alike_tokens(branches: int) -> int:
    """Forced tokens of all paths but the first that are not computed, being those which the first one begins with."""
    first, *others = (VOCAB.path_prefix(_label(path)) for path in range(branches))
    pairs = (zip(first, other, strict=False) for other in others)
    return sum(len(list(takewhile(lambda ids: ids[0] == ids[1], both))) for both in pairs)


class Script:
    """Plays what a script says, at the cost of a draw."""

    def __init__(self, script: dict[int, list[int]]) -> None:
        self.script = script

    def __call__(self, logits: Tensor, sampling: SamplingArrays) -> tuple[Tensor, Tensor]:
        """See `Sampler`."""
        greedy(logits)
        pairs = zip(sampling.keys.tolist(), sampling.indices.tolist(), strict=True)
        # A step that was planned before the end was known asks for one more, which is dropped.
        ids = [self.script[key][index] if index < len(self.script[key]) else TEXT for key, index in pairs]
        # Of a step that reads part of a prompt, none are asked for.
        tokens = torch.tensor(ids, dtype=torch.int64, pin_memory=logits.is_cuda).to(logits.device, non_blocking=True)
        return tokens, token_logprobs(logits, tokens)
