"""Where a block may fork or join with the tokens in flight, the next step waits for them.

With overlap a step is launched before the tokens of the one before it are known. If such a token is `</Goal>`, or ends
the last path of a block, that step has run for nothing, since nothing but the paths, or the conclusion, goes on. Tags
stand on lines of their own, so this can be foreseen: after most tokens no tag can come, and their steps are launched
ahead; after the end of a line one may, and then the step is made ready and held back until the tokens are here, which
takes some microseconds. If they turn what comes next, it is taken back and planned again. What the paths of a block
would begin with is made while the host waits (`commit.foresee_fork`).

Whether a step waits changes no token; a tag in the middle of a line is found a step later.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_multiverse.inference.draft import Step
from megatron_multiverse.inference.text.branch import Block, Branch
from megatron_multiverse.inference.text.state import Detokenize, RequestState
from megatron_multiverse.structure import StructureVocab, Tag

LEAST_SHARE = 4
"""A step is worth planning again, while the model waits, if it turns at least one in so many requests."""


class Turns:
    """Tells which tokens in flight may fork or join a block, and which did.

    Args:
        vocab: ids of tags and the newline.
        detokenize: ids -> text, to know other tokens that end a line; without it only the newline does.
    """

    def __init__(self, vocab: StructureVocab, detokenize: Detokenize | None) -> None:
        self._detokenize = detokenize
        self._end_goal, self._end_path = vocab.tag_ids[Tag.END_GOAL], vocab.tag_ids[Tag.END_PATH]
        self._ends_line = {vocab.newline_id: True}

    def ends_line(self, token: int) -> bool:
        """Whether a line ends with this token."""
        known = self._ends_line.get(token)
        if known is None:
            known = self._detokenize is not None and self._detokenize([token]).endswith("\n")
            self._ends_line[token] = known
        return known

    def may_come(self, step: Step, num_requests: int) -> bool:
        """Whether the tokens that this step draws may turn enough of the requests that run."""
        forks: set[RequestState] = set()
        ending: dict[Branch, RequestState] = {}
        for state, branch, length in step.sampled:
            if branch.machine.may_fork:
                forks.add(state)
            elif branch.parent is not None and self.ends_line(branch.ids[-1]) and branch.goes_on_after(length):
                ending[branch] = state
        return _are_enough(forks, ending, num_requests)

    def came(self, step: Step, tokens: Sequence[int], num_requests: int) -> bool:
        """Whether these tokens, drawn by the step, turn enough of the requests that run."""
        forks: set[RequestState] = set()
        ended: dict[Branch, RequestState] = {}
        for (state, branch, length), token in zip(step.sampled, tokens, strict=True):
            if token == self._end_goal and branch.machine.may_fork:
                forks.add(state)
            elif token == self._end_path and branch.goes_on_after(length):
                ended[branch] = state
        return _are_enough(forks, ended, num_requests)


def _are_enough(forks: set[RequestState], ended: dict[Branch, RequestState], num_requests: int) -> bool:
    """Whether these forks, and the joins of blocks once these branches have ended, are in enough requests."""
    if LEAST_SHARE * (len(forks) + len(ended)) < max(num_requests, 1):
        return False
    return LEAST_SHARE * len(forks | _joining(ended)) >= num_requests


def _joining(ended: dict[Branch, RequestState]) -> set[RequestState]:
    """The requests in which a block joins once these branches have ended."""
    found = set()
    for branch, state in ended.items():
        block: Block | None = None if branch.parent is None else branch.parent.open_block
        if block is not None and all(kid.finish is not None or kid in ended for kid in block.kids):
            found.add(state)
    return found
