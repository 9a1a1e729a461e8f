"""How many tokens a branch may write: where `max_tokens`, `max_critical_tokens` and `branch_max_tokens` are enforced.

A budget is split when a block forks, so what a branch may write never depends on how fast its siblings run. What
closes the structure is reserved from the start: a branch stops while its closing tags still fit, never in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_multiverse.config.sampling import LEAST_PATH_TOKENS, SamplingParams
from megatron_multiverse.inference.text.branch import Branch, Budget
from megatron_multiverse.structure import Tag

MAX_GROWTH = 3
"""An opening tag may need three more closing ids. After `<Goal>`, for example: a newline, `</Goal>`, and the newline
before `</Parallel>`."""

MOST_CLOSERS = 32
"""No branch ever has that many ids to close (each path has a machine of its own, which holds one open block), so with
more room than this no exact count is needed."""


def whole_budget(sampling: SamplingParams, start: int, max_position: int) -> Budget:
    """What the root of a request may write.

    Args:
        sampling: names the limits.
        start: position of its first token.
        max_position: positions the model can take.
    """
    chain = sampling.max_tokens if sampling.max_critical_tokens is None else sampling.max_critical_tokens
    return Budget(sampling.max_tokens, min(start + chain, max_position))


def fits(branch: Branch, token: int) -> bool:
    """Whether `token` and whatever then closes the branch stay within the budget."""
    if branch.leaves_open:
        return branch.room >= 1
    closing = branch.closing_ids()
    vocab = branch.machine.vocab
    tag = vocab.tag_of.get(token)
    if tag in (Tag.PARALLEL, Tag.GOAL, Tag.OUTLINE, Tag.THINK, Tag.END_GOAL):
        growth = MAX_GROWTH
    elif closing and closing[0] == token:
        growth = -1
    else:
        # After a newline the first closing tag needs none before it; after anything else it does.
        growth = int(bool(closing) and closing[0] != vocab.newline_id and token != vocab.newline_id)
    return 1 + len(closing) + growth <= branch.room


def exhausted(branch: Branch) -> bool:
    """Whether nothing fits any more but what closes the branch."""
    return branch.room <= len(branch.closing_ids())


def shares(
    branch: Branch, prefixes: Sequence[Sequence[int]], branch_max_tokens: int | None = None
) -> list[Budget] | None:
    """Budgets of the paths of a block, or None if they cannot even be opened and closed.

    Equal shares; what a path leaves over comes back at the join, for the text after the block.

    Args:
        branch: wrote the `</Goal>` of the block.
        prefixes: the forced tokens each path begins with.
        branch_max_tokens: what each path may write itself after them.
    """
    needs = [len(prefix) + LEAST_PATH_TOKENS for prefix in prefixes]
    tail = len(branch.closing_ids())
    spare = branch.budget.tokens - branch.total - branch.dropped_tokens - tail - sum(needs)
    position = branch.budget.position - tail
    if spare < 0 or branch.next_position + max(needs) > position:
        return None
    owns = [None if branch_max_tokens is None else len(prefix) + branch_max_tokens for prefix in prefixes]
    return [Budget(need + spare // len(needs), position, own) for need, own in zip(needs, owns, strict=True)]
