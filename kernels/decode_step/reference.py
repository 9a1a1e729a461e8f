"""What stands before the layers of a decode step and behind its draw: the plain versions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_multiverse.kernels.rope import rope_table
from megatron_multiverse.kernels.sampling import pack_drawn


class Moving(NamedTuple):
    """The integers of a step in which each row brings one token, as far as they differ in the next one, if each row
    only goes on by the token that it draws, in the page where its last one is.

    The step may be padded: slots of -1 write nothing, and items without keys stay without.
    """

    sources: Tensor
    """int64 [n], see `begin_step_reference`."""
    positions: Tensor
    """int64 [n]."""
    indices: Tensor
    """int64 [rows], of the token among those that a row has drawn."""
    write_slots: Tensor
    """int64 [m]."""
    items: Tensor
    """int32 [items, 4], of attention's list; see `tree_decode.Work` for this and the next three."""
    tokens: Tensor
    """int32 [items, sharers]; does not change."""
    limits: Tensor
    """int32 [items, sharers]."""
    pages: Tensor
    """int32 [p]."""
    at_end: Tensor
    """int32 [items], 1 where an item ends where its row does; does not change."""
    ends: Tensor
    """int32 [rows], where in `pages` the last page of a row stands whose last slot to be read is told there, else -1;
    does not change."""


def known_ids(ids: Tensor, sources: Tensor, last_tokens: Tensor) -> Tensor:
    """int64 [n]: `ids` with the tokens filled in that the step before drew; see `begin_step_reference`."""
    return torch.where(sources < 0, ids, last_tokens[sources.clamp(min=0)])


def begin_step_reference(
    ids: Tensor,
    sources: Tensor | None,
    last_tokens: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    embedding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens of a step, their rotary table and their rows of the embedding.

    Args:
        ids: int64 [n].
        sources: int64 [n], where a token is not known yet: which of `last_tokens` it is; else -1. None: all are known.
        last_tokens: int64, what the step before drew.
        positions: int64 [n].
        inv_freq: [dim / 2], see `rope_table`.
        embedding: [vocab, hidden], or None where its rows are not asked for.

    Returns:
        int64 [n]; [1, n, dim] in the dtype of inv_freq; [n, hidden] or None.
    """
    if sources is not None:
        assert last_tokens is not None, "tokens that are not known stand there"
        ids = known_ids(ids, sources, last_tokens)
    hidden = None if embedding is None else torch.nn.functional.embedding(ids, embedding)
    return ids, rope_table(positions[None], inv_freq), hidden


def end_step_reference(
    drawn: tuple[Tensor, Tensor] | None, last_tokens: Tensor, moving: Moving | None, page_size: int
) -> Tensor | None:
    """Put down what a step has drawn, and make its integers those of the next one.

    Args:
        drawn: int64 [rows], tokens, and [rows], their log-probabilities; None where the caller draws after this.
        last_tokens: int64 [at least rows], where the next step finds the tokens; written in place.
        moving: written in place; None where the next step brings its own.
        page_size: keys per page.

    Returns:
        What was drawn as `pack_drawn` packs it, or None.
    """
    if moving is not None:
        moving.sources.copy_(torch.arange(len(moving.sources)))
        moving.positions.add_(1)
        moving.indices.add_(1)
        moving.write_slots.add_((moving.write_slots >= 0).long())
        moving.items[:, 2] += moving.at_end
        moving.limits.add_((moving.tokens >= 0).int())
        ends = moving.ends[moving.ends >= 0].long()
        last = moving.pages[ends]
        # Where all of a page may be read already, items end with their rows.
        moving.pages[ends] = last + ((last + 1) % page_size != 0).int()
    if drawn is None:
        return None
    last_tokens[: len(drawn[0])] = drawn[0]
    return pack_drawn(*drawn)
