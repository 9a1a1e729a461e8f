"""One mixed step as tensors: which tokens run, where their keys go, which slots each row attends to.

Rows are branches. A decode row brings one token, a prompt, a forked path or a conclusion a chunk of several. All
tokens lie flat in one sequence [1, n], so megatron-core's layers run unchanged; only the core attention asks
`PagedParams`, which writes the new keys and values into their slots first and then attends row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_multiverse.inference.pages import PagePool
from megatron_multiverse.inference.tree import Node
from megatron_multiverse.kernels.tree_decode import tree_decode
from megatron_multiverse.model.attention import AttentionParams

if TYPE_CHECKING:
    from megatron_multiverse.inference.branch import Branch

SPLIT_BY_LENGTH = 8192
"""Slots in a step beyond which rows of very different length are not padded to one rectangle."""


class Row(NamedTuple):
    """One branch in one step."""

    branch: Branch
    node: Node
    ids: list[int]
    """Tokens it brings."""
    start: int
    """Index of the first of them in the node."""
    position: int
    """Position of the first of them."""
    sample: bool
    """Whether the logits of the last token are needed."""


@dataclass
class RowGroup:
    """Rows with about the same number of new tokens, padded to one rectangle."""

    tokens: Tensor | None
    """int64 [rows * q], flat token index of each query; None: all tokens in order."""
    q: int
    slot_table: Tensor
    """int64 [rows, k]."""
    visible: Tensor
    """bool [rows, q, k]."""
    keep: Tensor | None
    """int64, which of the rows * q queries are not padding; None: all."""


@dataclass
class StepBatch:
    """Everything the model needs for one step."""

    input_ids: Tensor
    """int64 [1, n]."""
    position_ids: Tensor
    """int64 [1, n]."""
    write_slots: Tensor
    """int64 [m], m >= n: a token whose slot was copied before it was written has several."""
    write_tokens: Tensor | None
    """int64 [m], the token each slot receives; None: slot i receives token i."""
    groups: list[RowGroup]
    logit_tokens: Tensor
    """int64, flat indices of the tokens whose logits are needed, in row order."""


def build_batch(rows: Sequence[Row], pool: PagePool) -> StepBatch:
    """Lay out the rows of a step. Python work is per row, never per token."""
    device = pool.keys.device

    def tensor(array: np.ndarray | list[int]) -> Tensor:
        return torch.from_numpy(np.asarray(array, dtype=np.int64)).to(device)

    counts = np.array([len(row.ids) for row in rows], dtype=np.int64)
    offsets = np.cumsum(counts) - counts
    total = int(counts.sum())
    first = np.array([row.position for row in rows], dtype=np.int64)
    positions = np.repeat(first - offsets, counts) + np.arange(total)
    slots = np.concatenate([row.node.slots[row.start : row.start + len(row.ids)] for row in rows])
    slots, sources = _with_aliases(slots, pool)
    return StepBatch(
        input_ids=tensor(list(chain.from_iterable(row.ids for row in rows)))[None],
        position_ids=tensor(positions)[None],
        write_slots=tensor(slots),
        write_tokens=None if sources is None else tensor(sources),
        groups=_groups(rows, counts, offsets, pool),
        logit_tokens=tensor([int(o + c - 1) for row, o, c in zip(rows, offsets, counts, strict=True) if row.sample]),
    )


def _with_aliases(slots: np.ndarray, pool: PagePool) -> tuple[np.ndarray, np.ndarray | None]:
    pairs = pool.alias_pairs()
    if not pairs:
        return slots, None
    token_of = {int(slot): k for k, slot in enumerate(slots)}
    extra = np.array([alias for _, alias in pairs], dtype=np.int64)
    sources = np.array([token_of[slot] for slot, _ in pairs], dtype=np.int64)
    return np.concatenate([slots, extra]), np.concatenate([np.arange(len(slots)), sources])


def _groups(rows: Sequence[Row], counts: np.ndarray, offsets: np.ndarray, pool: PagePool) -> list[RowGroup]:
    # Padding at most doubles the queries of a row (buckets are powers of two), and its keys once they are many.
    lengths = np.array([row.start for row in rows], dtype=np.int64) + counts
    buckets = np.where(counts == 1, 0, np.ceil(np.log2(counts))) * 64
    if len(rows) * int(lengths.max()) > SPLIT_BY_LENGTH:
        buckets += np.ceil(np.log2(lengths))
    device = pool.keys.device
    groups = []
    for bucket in np.unique(buckets):
        index = np.flatnonzero(buckets == bucket)
        members = [rows[i] for i in index.tolist()]
        count, offset = counts[index], offsets[index]
        length = lengths[index]
        starts = length - count
        q, k = int(count.max()), int(length.max())
        table = np.full((len(members), k), pool.dummy_slot, dtype=np.int64)
        for line, row, n in zip(table, members, length.tolist(), strict=True):
            line[:n] = row.node.slots[:n]
        visible = np.arange(k) <= (starts[:, None] + np.arange(q))[:, :, None]
        tokens = offset[:, None] + np.minimum(np.arange(q), count[:, None] - 1)
        keep = np.flatnonzero(np.arange(q) < count[:, None])
        whole = len(members) == len(rows) and len(keep) == tokens.size
        groups.append(
            RowGroup(
                tokens=None if whole else torch.from_numpy(tokens.reshape(-1)).to(device),
                q=q,
                slot_table=torch.from_numpy(table).to(device),
                visible=torch.from_numpy(visible).to(device),
                keep=None if len(keep) == tokens.size else torch.from_numpy(keep).to(device),
            )
        )
    return groups


@dataclass
class PagedParams(AttentionParams):
    """Attention over the page pool for one step."""

    pool: PagePool | None = None
    batch: StepBatch | None = None
    first_layer: int = 1
    """Number of the first layer of this pipeline stage: the pool holds only this stage's layers."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer_number: int, softmax_scale: float) -> Tensor:
        """See AttentionParams.attend; s is the number of tokens of the step, b is 1."""
        assert self.pool is not None and self.batch is not None
        batch = self.batch
        keys = self.pool.keys[layer_number - self.first_layer]
        values = self.pool.values[layer_number - self.first_layer]
        key, value = key[:, 0], value[:, 0]
        if batch.write_tokens is not None:
            key, value = key.index_select(0, batch.write_tokens), value.index_select(0, batch.write_tokens)
        keys.index_copy_(0, batch.write_slots, key)
        values.index_copy_(0, batch.write_slots, value)
        flat = query[:, 0]
        heads, dim = flat.shape[1:]
        out = torch.empty_like(flat)
        for group in batch.groups:
            rows = len(group.slot_table)
            part = flat if group.tokens is None else flat.index_select(0, group.tokens)
            got = tree_decode(
                part.reshape(rows, group.q, heads, dim), keys, values, group.slot_table, group.visible, softmax_scale
            ).reshape(-1, heads, dim)
            if group.tokens is None:
                out = got
            elif group.keep is None:
                out.index_copy_(0, group.tokens, got)
            else:
                out.index_copy_(0, group.tokens.index_select(0, group.keep), got.index_select(0, group.keep))
        return out.reshape(len(flat), 1, heads * dim)
