"""From the token ids of a whole sample to the spans of its blocks and paths, strictly or tolerantly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_multiverse.errors import StructureError
from megatron_multiverse.structure.document import Document
from megatron_multiverse.structure.machine import StructureMachine
from megatron_multiverse.structure.prompt import opens_thought
from megatron_multiverse.structure.tags import StructureVocab


def parse(
    ids: Sequence[int] | npt.NDArray[np.integer],
    vocab: StructureVocab,
    *,
    prompt_length: int = 0,
    strict: bool = True,
    sample: str | None = None,
    max_depth: int | None = None,
    max_paths: int | None = None,
) -> Document:
    """Find blocks and paths in one sample.

    Args:
        ids: token ids of prompt and response, shape [N].
        vocab: the ids in which structure is written.
        prompt_length: the first `prompt_length` tokens are the prompt: tags in it are inert, but that a response to a
            prompt which ends inside of a thought may close it.
        strict: raise at the first broken rule; otherwise broken structure is read as plain text and counted in
            `Document.malformed`.
        sample: name of the sample for the error.
        max_depth: blocks deeper than this are plain text, as in an engine with that limit (None: no limit).
        max_paths: likewise for blocks with more outlines.

    Returns:
        The spans, as indices into `ids`.

    Raises:
        StructureError: `strict` and the response breaks the grammar.
    """
    array = np.asarray(ids, dtype=np.int64)
    machine = StructureMachine(vocab, max_depth=max_depth, max_paths=max_paths)
    machine.num_tokens = prompt_length
    if opens_thought(array[:prompt_length], vocab):
        machine.begin_in_thought()
    tag_indices = vocab.find_tags(array[prompt_length:]) + prompt_length
    position = prompt_length
    # Tokens count one by one only in gaps and labels, where the machine is watching. All other text up to the next tag
    # is skipped at once.
    for next_tag in [*tag_indices.tolist(), len(array)]:
        while position < next_tag and machine.watching:
            machine.push(int(array[position]))
            position += 1
        if position < next_tag:
            machine.skip(next_tag - position, int(array[next_tag - 1]))
            position = next_tag
        if position < len(array):
            machine.push(int(array[position]))
            position += 1
        if strict and machine.problem is not None:
            break
    if machine.problem is None or not strict:
        machine.finish()
    if strict and (problem := machine.problem) is not None:
        raise StructureError(
            problem.code,
            token_index=problem.token_index,
            found=problem.found,
            expected=problem.expected,
            sample=sample,
        )
    return Document(len(array), prompt_length, machine.blocks, machine.malformed)
