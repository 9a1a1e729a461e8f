"""What the tags of a prompt mean for the text that follows it: nothing, but for a thought that it leaves open."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_multiverse.structure.tags import StructureVocab, Tag

Thought = Literal["none", "open", "closed"]
"""Where a text stands at its end: it has thought nothing, is in a thought, or has ended one."""


def last_thought(
    ids: Sequence[int] | npt.NDArray[np.integer], vocab: StructureVocab, end_ids: Collection[int] = ()
) -> Thought:
    """Where a text stands at its end, as the last Think tag in it says.

    Args:
        ids: its token ids, shape [N].
        vocab: the ids in which structure is written.
        end_ids: ids that end a text, beside the end-of-document token. What stands before them is of another text.
    """
    think, end_think = vocab.tag_ids[Tag.THINK], vocab.tag_ids[Tag.END_THINK]
    if think not in ids and end_think not in ids:  # as in nearly all prompts, so it has to be quick
        return "none"
    found: dict[int | None, Thought] = dict.fromkeys([*end_ids, vocab.eos_id], "none")
    found |= {think: "open", end_think: "closed"}
    return next((found[token] for token in reversed(ids) if token in found), "none")


def opens_thought(ids: Sequence[int] | npt.NDArray[np.integer], vocab: StructureVocab) -> bool:
    """Whether a prompt ends by opening a thought, in which the answer then begins: with ``<Think>``, and nothing but
    newlines behind it, as many chat templates do. A tag that more text follows may be quoted, so it opens none.

    Args:
        ids: token ids of the prompt, shape [N].
        vocab: the ids in which structure is written.
    """
    last = next((token for token in reversed(ids) if token != vocab.newline_id), None)
    return bool(last == vocab.tag_ids[Tag.THINK])
