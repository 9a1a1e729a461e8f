"""Earlier answers in a prompt, laid out again as they were generated.

The next turn of a chat sends the earlier answers along as text. Read as such, path 2 sees path 1, and positions count
all paths one after the other; so a prompt is read unless a request says otherwise. `Request.replay_structure` names the
answers instead: their blocks fork and join in the cache as they did when they were written, and the model meets keys
and positions of the kind it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_multiverse.inference.text.branch import Block, Branch
from megatron_multiverse.structure import StructureMachine, StructureVocab, lay_out, parse
from megatron_multiverse.structure.document import BlockSpan, Document


def replay_answers(root: Branch, ids: Sequence[int], answers: Sequence[tuple[int, int]]) -> None:
    """Write a prompt into a fresh root, with the blocks of earlier answers as ended, joined blocks of it.

    Args:
        root: the root of a request; nothing is written yet.
        ids: the prompt.
        answers: [start, end) of each answer in it, in order.
    """
    vocab = root.machine.vocab
    blocks = [block for start, end in answers for block in _blocks(ids, start, end, vocab)]
    positions: Sequence[int] = range(len(ids))
    if blocks:
        positions = lay_out(Document(len(ids), len(ids), blocks)).position_ids.tolist()
    _write(root, ids, positions, 0, len(ids), blocks)
    root.prompt_length, root.prompt_blocks = len(root.ids), len(root.blocks)
    root.next_position = root.positions[-1] + 1


def _blocks(ids: Sequence[int], start: int, end: int, vocab: StructureVocab) -> list[BlockSpan]:
    """The outermost blocks of an answer. What breaks the grammar, or was cut off, is no block: it is read as text."""
    blocks = parse(ids[:end], vocab, prompt_length=start, strict=False).blocks
    return [block for block in blocks if block.paths and block.forced_end >= 0]


def _write(
    branch: Branch, ids: Sequence[int], positions: Sequence[int], start: int, end: int, blocks: Sequence[BlockSpan]
) -> None:
    """Give a branch the tokens [start, end) of a prompt, less those that paths of its blocks take."""
    for span in blocks:
        if not span.paths:
            continue
        _append(branch, ids, positions, start, span.goal_end)
        block = Block(0, len(branch.ids), [], joined=True)
        for path in span.paths:
            machine = StructureMachine(branch.machine.vocab)  # never used: the path has ended
            kid = Branch(machine, 0, branch.budget, branch.key, parent=branch, finish="path_end")
            _write(kid, ids, positions, path.start, path.end, path.blocks)
            block.kids.append(kid)
        branch.blocks.append(block)
        start = span.region_end
    _append(branch, ids, positions, start, end)


def _append(branch: Branch, ids: Sequence[int], positions: Sequence[int], start: int, end: int) -> None:
    branch.ids += ids[start:end]
    branch.positions += positions[start:end]
    branch.logprobs += [None] * (end - start)
