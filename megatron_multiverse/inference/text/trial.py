"""Blocks whose paths are tries: once enough of them succeed, the others are dropped (`SamplingParams.commit_after`).

Which tries are early is told by positions, not by the clock. A block is committed at the position p where the k-th
path that succeeds ended. What had ended by p stays; a path that had not is dropped: its text is cut to its label and
closed, so the grammar holds and the conclusion reads what finished. Paths that run in step reach p at the same time. A
path that lags, because rows are few or it runs after its siblings, goes on until it is past p. So the answer is the
same whatever runs beside.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_multiverse.inference.text.branch import Block, Branch
from megatron_multiverse.inference.text.request import Try
from megatron_multiverse.inference.text.state import RequestState


def note_end(state: RequestState, block: Block, branch: Branch) -> None:
    """A path has written its `</Path>`: see whether it succeeds, and whether the block is committed by that.

    What the request's predicate raises becomes the error of the request.
    """
    try:
        good = _succeeds(state, branch)
    except Exception as error:
        state.error = f"accept raised {error!r}"
        return
    if good:
        block.successes = sorted([*block.successes, branch.next_position - 1])
    wanted = state.request.sampling.commit_after
    if len(block.successes) >= wanted:
        block.commit_at = block.successes[wanted - 1]


def _succeeds(state: RequestState, branch: Branch) -> bool:
    sampling, accept = state.request.sampling, state.request.accept
    if not sampling.commit_on and accept is None:
        return True
    assert state.detokenize is not None
    text = state.detokenize(_ids(branch))
    return sampling.commit_on in text and (accept is None or bool(accept(Try(branch.name, branch.outline, text))))


def is_late(branch: Branch, commit_at: int) -> bool:
    """Whether a path has ended after this position, or will, and has written everything up to it."""
    if branch.finish is not None:
        return branch.next_position - 1 > commit_at
    if branch.open_block is None:
        return branch.next_position > commit_at
    return all(kid.finish is not None or is_late(kid, commit_at) for kid in branch.open_block.kids)


def inner_branches(branch: Branch) -> Iterator[Branch]:
    """Everything that a branch has forked."""
    for block in branch.blocks:
        for kid in block.kids:
            yield kid
            yield from inner_branches(kid)


def written_by(branch: Branch, commit_at: int) -> Iterator[tuple[Branch, int]]:
    """(branch, index of a token), in text order, of what a dropped path had written when its block was committed."""
    done = 0
    for block in [*branch.blocks, None]:
        end = len(branch.ids) if block is None else block.at
        yield from ((branch, index) for index in range(done, end) if branch.positions[index] <= commit_at)
        done = end
        for kid in [] if block is None else block.kids:
            if kid.tried is None or block is None or block.commit_at is None:
                yield from written_by(kid, commit_at)
            else:  # it was dropped itself
                yield from written_by(kid.tried, min(commit_at, block.commit_at))


def _ids(branch: Branch) -> list[int]:
    """The tokens of a path and of all it forked, in text order."""
    ids, done = [], 0
    for block in branch.blocks:
        ids += branch.ids[done : block.at]
        done = block.at
        for kid in block.kids:
            ids += _ids(kid)
    return ids + branch.ids[done:]
