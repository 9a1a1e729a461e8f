"""Launch 1 of the scan: every chunk of tokens lists its tags. A tag is packed into one int32, index << 4 | kind."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from megatron_multiverse.structure import TAGS, Tag

# The kind of a tag is its number in structure.Tag. A kernel can read a global only if it is a constexpr.
THINK = tl.constexpr(int(Tag.THINK))
END_THINK = tl.constexpr(int(Tag.END_THINK))
PARALLEL = tl.constexpr(int(Tag.PARALLEL))
END_PARALLEL = tl.constexpr(int(Tag.END_PARALLEL))
GOAL = tl.constexpr(int(Tag.GOAL))
END_GOAL = tl.constexpr(int(Tag.END_GOAL))
OUTLINE = tl.constexpr(int(Tag.OUTLINE))
END_OUTLINE = tl.constexpr(int(Tag.END_OUTLINE))
PATH = tl.constexpr(int(Tag.PATH))
END_PATH = tl.constexpr(int(Tag.END_PATH))
CONCLUSION = tl.constexpr(int(Tag.CONCLUSION))
END_CONCLUSION = tl.constexpr(int(Tag.END_CONCLUSION))
NUM_TAGS = tl.constexpr(len(TAGS))
NONE = tl.constexpr(len(TAGS))
"""What stands before the first tag of a response and after the last."""


@triton.jit
def classify(ids, tag_ids):
    """Kind of every id, -1 for text. It compares instead of looking up a table, which a wild id could index out of
    bounds."""
    kind = tl.full(ids.shape, -1, tl.int32)
    for k in tl.static_range(NUM_TAGS):
        kind = tl.where(ids == tl.load(tag_ids + k), k, kind)
    return kind


@triton.jit
def kind_of(word):
    """Kind of a packed tag."""
    return word & 15


@triton.jit
def index_of(word):
    """Index of the token of a packed tag."""
    return word >> 4


@triton.jit
def is_border(kind):
    """Whether positions and labels shift after a tag of this kind: /Goal and /Path."""
    return (kind == END_GOAL) | (kind == END_PATH)


@triton.jit(do_not_specialize=["num_tokens", "row_stride", "chunks"])
def tags_kernel(ids_ptr, tag_ids, tags_ptr, counts_ptr, before_ptr, num_tokens, row_stride, chunks,
                CHUNK: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """Program (chunk, row): list the tags of the chunk in its own CHUNK slots, and count them before each token.

    Args:
        ids_ptr: [b, s] token ids.
        tags_ptr: int32 [b, chunks, CHUNK] index << 4 | kind of the tags of each chunk, in order.
        counts_ptr: int32 [b, chunks] tags of each chunk, and how many of them are borders << 16.
        before_ptr: int32 [b, s + 1] the same two counts, of those tags of a token's chunk that stand before the token.
            Place s is there for documents that end at s, hence chunks = s // CHUNK + 1.
        CHAINED: the next launch may begin while this one runs.
    """
    if CHAINED:
        cuda.gdc_launch_dependents()
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + row * row_stride + token, mask=token < num_tokens, other=-1)
    kind = classify(ids, tag_ids)
    is_tag = (kind >= 0) & (token < num_tokens)
    # One sum counts both: tags in the low half, borders in the high half. The exclusive sum is also the slot of a tag.
    found = tl.where(is_tag, 1 + (is_border(kind).to(tl.int32) << 16), 0)
    before = tl.cumsum(found, axis=0) - found
    tl.store(tags_ptr + (row * chunks + chunk) * CHUNK + (before & 0xFFFF), token << 4 | kind, mask=is_tag)
    tl.store(before_ptr + row * (num_tokens + 1) + token, before, mask=token <= num_tokens)
    tl.store(counts_ptr + row * chunks + chunk, tl.sum(found, axis=0))
