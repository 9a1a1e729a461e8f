"""What of a branch the cache has seen: how far it may be fed, and when its blocks fork and join there.

Text and cache fork and join at different times: the text when a token is committed, the cache when that token is fed.
"""

from __future__ import annotations

from megatron_multiverse.inference.text.branch import Block, Branch


def cache_block(branch: Branch) -> Block | None:
    """The next block of a branch that has to fork or join in the cache."""
    return branch.blocks[branch.num_joined] if branch.num_joined < len(branch.blocks) else None


def block_to_join(branch: Branch) -> Block | None:
    """The next block of a branch to join in the cache, if all its paths have ended and are fed to the end."""
    block = cache_block(branch)
    return block if block is not None and all(map(is_fed, block.kids)) else None


def feed_end(branch: Branch) -> int:
    """How many tokens of a branch may be fed before a block forks, or joins, in the cache."""
    block = cache_block(branch)
    return len(branch.ids) if block is None else block.at


def is_fed(branch: Branch) -> bool:
    """Whether a branch has ended and all its keys are in the cache."""
    return branch.finish is not None and branch.fed == len(branch.ids)


def wants_row(branch: Branch) -> bool:
    """Whether a branch with a place in the cache takes part in steps: not while it waits for its paths, not once it
    has ended and is fed."""
    return branch.fed < feed_end(branch) or (branch.finish is None and branch.num_joined == len(branch.blocks))


def goes_on_after(branch: Branch, length: int) -> bool:
    """Whether a branch has written `length` tokens and goes on with one that is drawn."""
    all_joined = not branch.blocks or branch.blocks[-1].joined
    return len(branch.ids) == length and branch.finish is None and all_joined
