"""How a branch forks into the paths of a block, and how they join: text, positions and budgets.

The cache side of both is `PageTree.fork` and `PageTree.join` (tree.py); when they happen is the scheduler's business
(`Scheduler._start_paths`, `Scheduler._join`).
"""

from __future__ import annotations

from megatron_multiverse.inference.branch import Block, Branch, Status
from megatron_multiverse.inference.budget import shares


def fork(branch: Branch) -> bool:
    """Create the branches of the block just announced, or refuse because their forced tokens do not fit."""
    vocab = branch.machine.vocab
    outlines = branch.machine.outlines
    prefixes = [vocab.path_prefix(outline.label_ids) for outline in outlines]
    budgets = shares(branch, prefixes)
    if budgets is None:
        return False
    ordinal = len(branch.blocks)
    branch.request.num_blocks += 1
    block = Block(branch.request.num_blocks, len(branch.ids), [])
    for k, (outline, budget) in enumerate(zip(outlines, budgets, strict=True)):
        kid = Branch(
            request=branch.request,
            machine=branch.machine.fork(k),
            next_position=branch.next_position,
            budget=budget,
            parent=branch,
            path=(*branch.path, (ordinal, k)),
            name=f"{branch.name}.{k + 1}" if branch.name else str(k + 1),
            outline=outline.label,
            block=block.number,
        )
        block.kids.append(kid)
    branch.blocks.append(block)
    for kid, prefix in zip(block.kids, prefixes, strict=True):
        kid.write(prefix)
    branch.status = Status.FORKED
    branch.end_span()
    return True


def join(branch: Branch) -> None:
    """All paths of the open block ended: count them in; the conclusion comes next."""
    block = branch.open_block
    assert block is not None
    block.joined = True
    branch.total += sum(kid.total for kid in block.kids)
    branch.next_position = max(kid.next_position for kid in block.kids)
    branch.machine.join()
